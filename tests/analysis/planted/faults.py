"""Faults as they happen, each planted in one module, with the place where it must be seen first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Change = Callable[[Any], None]


@dataclass(frozen=True)
class Fault:
    """What is wrong (``kind``) with ``module`` of a subject, and the tensors that show it first: ``site``.

    A site is a module, one of its directions, and which call of it; by default the module's outputs.
    """

    kind: str
    subject: str
    module: str
    change: Change
    site: tuple[str, str, int]
    within: str | None = None

    def __str__(self) -> str:
        return f"{self.subject}-{self.module}-{self.kind}".replace(" ", "-")

    def plant(self, model: nn.Module) -> None:
        self.change(model.get_submodule(self.module))


def fault(kind: str, subject: str, module: str, change: Change, seen: str = "", call: int = 0) -> Fault:
    """A fault seen in the module's outputs, or in the inputs of ``seen``, born in the module's code."""
    site = (seen, "inputs", call) if seen else (module, "outputs", call)
    return Fault(kind, subject, module, change, site, module if seen else None)


def attribute(name: str, value: Any) -> Change:
    return lambda module: setattr(module, name, value(getattr(module, name)) if callable(value) else value)


def parameter(change: Callable[[torch.Tensor], torch.Tensor], name: str = "weight") -> Change:
    def apply(module: Any) -> None:
        data = getattr(module, name).data
        data.copy_(change(data.clone()))

    return apply


def output(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change what a module returns; of several values, the first."""

    def hook(module: nn.Module, args: Any, found: Any) -> Any:
        if isinstance(found, tuple):
            return (change(found[0].clone()), *found[1:])
        return change(found.clone())

    return lambda module: module.register_forward_hook(hook)


def given(change: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]) -> Change:
    """Change what a module's own code goes by, behind what it is given."""

    def apply(module: Any) -> None:
        inner = module.forward

        def forward(*args: Any, **keywords: Any) -> Any:
            args, keywords = change(args, keywords)
            return inner(*args, **keywords)

        module.forward = forward

    return apply


def rounded(dtype: torch.dtype) -> Change:
    """Compute a linear layer in another dtype."""

    def apply(module: Any) -> None:
        def forward(x: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.to(dtype)
            return torch.nn.functional.linear(x.to(dtype), module.weight.to(dtype), bias).to(x.dtype)

        module.forward = forward

    return apply


def _one_row(factor: float, x: torch.Tensor) -> torch.Tensor:
    x.view(-1, x.shape[-1])[3] *= factor
    return x


def _race(x: torch.Tensor) -> torch.Tensor:
    """Some values are those of the row before, as if they were read too early."""
    flat = x.view(-1, x.shape[-1])
    early = torch.rand(flat.shape, generator=torch.Generator().manual_seed(3)) < 0.02
    return torch.where(early, flat.roll(1, 0), flat).view_as(x)


def _nan(x: torch.Tensor) -> torch.Tensor:
    x.view(-1)[37] = torch.nan
    return x


def _quantised(bits: int, x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    found: torch.Tensor = (x / scale).round() * scale
    return found


def _no_mask(args: Any, keywords: dict[str, Any]) -> Any:
    """Every position sees every other one."""
    hidden = args[0] if args else keywords["hidden_states"]
    length = hidden.shape[1]
    return args, {**keywords, "attention_mask": torch.zeros(1, 1, length, length, dtype=hidden.dtype)}


def _window(args: Any, keywords: dict[str, Any]) -> Any:
    """The last position is hidden from all."""
    hidden = args[0] if args else keywords["hidden_states"]
    mask = torch.zeros(1, 1, hidden.shape[1], hidden.shape[1], dtype=hidden.dtype)
    mask[..., -1] = torch.finfo(hidden.dtype).min
    args = (args[0], *[None if isinstance(each, torch.Tensor) else each for each in args[1:]])
    return args, {**keywords, "attention_mask": mask}


def _later(args: Any, keywords: dict[str, Any]) -> Any:
    return args, {**keywords, "position_ids": keywords["position_ids"] + 1}


def _next_position(args: Any, keywords: dict[str, Any]) -> Any:
    return (args[0] + 1, *args[1:]), keywords


def _base(module: Any) -> None:
    size = 2 * len(module.inv_freq)
    module.inv_freq.copy_(1 / 500_000 ** (torch.arange(0, size, 2) / size))


def _swapped(x: torch.Tensor) -> torch.Tensor:
    return x[[1, 0, *range(2, len(x))]]


def _one_expert(change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x[2] = change(x[2])
    return x


def _stale(cache: Any) -> None:
    layer = cache.layers[1]
    layer.keys[..., -1, :] = layer.keys[..., -2, :]
    layer.values[..., -1, :] = layer.values[..., -2, :]


def _second_call(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(module: Any) -> None:
        calls: list[int] = []

        def hook(_: nn.Module, args: Any, found: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return change(found.clone()) if len(calls) % 2 == 0 else found

        module.register_forward_hook(hook)

    return apply


def _narrow_norm(module: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        # In the dtype of the values, not in float32 as it should be.
        narrow = x.to(torch.bfloat16)
        size = (narrow * narrow).mean(-1, keepdim=True) + module.variance_epsilon
        found: torch.Tensor = module.weight.to(torch.bfloat16) * (narrow * torch.rsqrt(size))
        return found.to(x.dtype)

    module.forward = forward


def _call(new: Callable[..., Any]) -> Change:
    return lambda module: setattr(module, "forward", new)


def _first_of_wrong_token(module: Any) -> None:
    inner = module.forward
    module.forward = lambda hidden: inner(hidden.roll(-1, 1))


transposed = parameter(lambda x: x.T.contiguous())
quantised = {bits: parameter(partial(_quantised, bits)) for bits in (4, 8)}
wrong_row = {factor: output(partial(_one_row, factor)) for factor in (1.01, 1.1)}
race = output(_race)
_gelu = nn.functional.gelu
_L, _S = "model.layers", "self_attn"

_LLAMA = [
    fault("dtype", "llama", f"{_L}.1.{_S}.q_proj", rounded(torch.bfloat16)),
    fault("dtype", "llama", f"{_L}.2.mlp.down_proj", rounded(torch.float16)),
    fault("dtype", "llama", f"{_L}.0.post_attention_layernorm", _narrow_norm),
    fault("epsilon", "llama", f"{_L}.1.input_layernorm", attribute("variance_epsilon", 1e-3)),
    fault("epsilon", "llama", "model.norm", attribute("variance_epsilon", 1.1e-5)),
    fault("transposed weight", "llama", f"{_L}.0.{_S}.o_proj", transposed),
    fault("rope base", "llama", "model.rotary_emb", _base),
    fault("position", "llama", "model.rotary_emb", given(_later)),
    fault("wrong row", "llama", f"{_L}.1.mlp.down_proj", wrong_row[1.01]),
    fault("wrong row", "llama", "model.embed_tokens", wrong_row[1.1]),
    fault("mask", "llama", f"{_L}.1.{_S}", given(_no_mask), f"{_L}.1.{_S}.o_proj"),
    fault("scale", "llama", f"{_L}.2.{_S}", attribute("scaling", lambda x: x * 1.1), f"{_L}.2.{_S}.o_proj"),
    fault("quantised", "llama", f"{_L}.2.mlp.gate_proj", quantised[8]),
    fault("race", "llama", f"{_L}.0.mlp.up_proj", race),
    fault("swapped heads", "llama", f"{_L}.1.{_S}.k_proj", parameter(lambda x: x.roll(16, 0))),
    fault("activation", "llama", f"{_L}.1.mlp.act_fn", _call(_gelu)),
    fault("added twice", "llama", f"{_L}.1", output(lambda x: x * 1.001)),
    fault("swapped rows", "llama", "lm_head", parameter(_swapped)),
    fault("nan", "llama", f"{_L}.2.{_S}.v_proj", output(_nan)),
]
_BFLOAT16 = [
    fault("dtype", "llama-bfloat16", f"{_L}.1.input_layernorm", _narrow_norm),
    fault(
        "epsilon", "llama-bfloat16", f"{_L}.2.post_attention_layernorm", attribute("variance_epsilon", 0.1)
    ),
    fault("transposed weight", "llama-bfloat16", f"{_L}.1.{_S}.o_proj", transposed),
    fault("rope base", "llama-bfloat16", "model.rotary_emb", _base),
    fault("position", "llama-bfloat16", "model.rotary_emb", given(_later)),
    fault("wrong row", "llama-bfloat16", f"{_L}.2.mlp.down_proj", wrong_row[1.1]),
    fault("mask", "llama-bfloat16", f"{_L}.2.{_S}", given(_no_mask), f"{_L}.2.{_S}.o_proj"),
    fault("quantised", "llama-bfloat16", f"{_L}.1.mlp.gate_proj", quantised[4]),
    fault("quantised", "llama-bfloat16", f"{_L}.1.mlp.up_proj", quantised[8]),
    fault("race", "llama-bfloat16", f"{_L}.0.mlp.up_proj", race),
]
_M = "model.layers.1.mlp"
_MIXTRAL = [
    fault("swapped experts", "mixtral", f"{_M}.experts", parameter(_swapped, "down_proj")),
    fault("swapped experts", "mixtral", "model.layers.0.mlp.gate", parameter(_swapped)),
    fault(
        "quantised",
        "mixtral",
        f"{_M}.experts",
        parameter(partial(_one_expert, partial(_quantised, 8)), "down_proj"),
    ),
    fault(
        "expert lost",
        "mixtral",
        f"{_M}.experts",
        parameter(partial(_one_expert, torch.zeros_like), "down_proj"),
    ),
    fault("wrong row", "mixtral", f"{_M}.experts", wrong_row[1.01]),
    fault("race", "mixtral", "model.layers.0.mlp.experts", race),
    fault("epsilon", "mixtral", f"{_L}.1.post_attention_layernorm", attribute("variance_epsilon", 1e-4)),
    fault("dtype", "mixtral", f"{_L}.1.{_S}.v_proj", rounded(torch.bfloat16)),
]
_H = "transformer.h"
_GPT2 = [
    fault("position", "gpt2", "transformer.wpe", given(_next_position)),
    fault("transposed weight", "gpt2", f"{_H}.1.attn.c_proj", transposed),
    fault("bias lost", "gpt2", f"{_H}.0.mlp.c_fc", parameter(lambda x: x + 0.01, "bias")),
    fault("activation", "gpt2", f"{_H}.1.mlp.act", _call(_gelu)),
    fault("epsilon", "gpt2", "transformer.ln_f", attribute("eps", 1e-4)),
    fault("mask", "gpt2", f"{_H}.1.attn", given(_window), f"{_H}.1.attn.c_proj"),
    fault("wrong row", "gpt2", f"{_H}.0.mlp.c_proj", wrong_row[1.01]),
    fault("quantised", "gpt2", f"{_H}.1.attn.c_attn", quantised[8]),
]
_E = "encoder.layer"
_BERT = [
    fault("mask", "bert", f"{_E}.1.attention.self", given(_window)),
    fault("token types", "bert", "embeddings.token_type_embeddings", parameter(_swapped)),
    fault("position", "bert", "embeddings.position_embeddings", given(_next_position)),
    fault("transposed weight", "bert", f"{_E}.0.attention.self.query", transposed),
    fault("epsilon", "bert", f"{_E}.0.output.LayerNorm", attribute("eps", 1e-5)),
    fault("activation", "bert", f"{_E}.1.intermediate.intermediate_act_fn", _call(torch.relu)),
    fault("race", "bert", f"{_E}.1.output.dense", race),
    fault("quantised", "bert", f"{_E}.0.intermediate.dense", quantised[8]),
    fault("wrong token", "bert", "pooler", _first_of_wrong_token, "pooler.dense"),
]
_D = "decoder.block.1.layer"
_T5 = [
    fault(
        "position",
        "t5",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        parameter(lambda x: x.roll(1, 0)),
    ),
    fault("transposed weight", "t5", f"{_D}.1.EncDecAttention.k", transposed),
    fault("epsilon", "t5", "decoder.final_layer_norm", attribute("variance_epsilon", 1.0)),
    fault("wrong row", "t5", f"{_D}.2.DenseReluDense.wo", wrong_row[1.01]),
    fault("dtype", "t5", "encoder.block.1.layer.0.SelfAttention.o", rounded(torch.bfloat16)),
]
_I = f"inner.{_L}.1.{_S}"
_DECODING = [
    Fault(
        "stale cache",
        "decoding",
        "",
        lambda m: setattr(m, "between", _stale),
        (f"{_I}.o_proj", "inputs", 1),
        _I,
    ),
    fault("race", "decoding", f"inner.{_L}.2.mlp.up_proj", _second_call(_race), call=1),
    fault("wrong row", "decoding", f"{_I}.v_proj", _second_call(partial(_one_row, 1.01)), call=1),
]
_ADAPTED = [
    fault("wrong adapter", "adapted", "blocks.1.adapter", attribute("chosen", 1)),
    fault("adapter scale", "adapted", "blocks.2.adapter", attribute("scale", 2.002)),
    fault("adapter lost", "adapted", "blocks.0.adapter", attribute("scale", 0.0)),
    fault("quantised", "adapted", "blocks.1.base", quantised[8]),
    fault("dtype", "adapted", "blocks.2.base", rounded(torch.bfloat16)),
    fault("wrong row", "adapted", "head", wrong_row[1.01]),
]
FAULTS = [*_LLAMA, *_BFLOAT16, *_MIXTRAL, *_GPT2, *_BERT, *_T5, *_DECODING, *_ADAPTED]
