"""How engines call the modules of one decoder: names are paired under those that transformers has.

vLLM and SGLang call modules as transformers does where they have the same ones. A name is in a table only
where the tensor is the same: Megatron's ``linear_qkv`` has its rows in another order than ``qkv_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Rename = tuple[re.Pattern[str], str]

_PARAMETER = r"^(param\.)?"
# By data parallelism, the compiler, FSDP, and peft.
_WRAPPED = r"(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)"
_LAYER = r"decoder\.layers\.(\d+)"


class Convention(NamedTuple):
    """The names of one kind of model: how they are told, and what they are in transformers."""

    title: str
    seen: re.Pattern[str]
    renames: tuple[Rename, ...]


def _table(begin: str, names: dict[str, str]) -> tuple[Rename, ...]:
    """Renames of whole names, of modules and of their parameters."""
    return tuple(
        (re.compile(rf"{_PARAMETER}{begin}{old}(?=\.weight$|\.bias$|$)"), new) for old, new in names.items()
    )


_PLAIN = Convention("transformers", re.compile(r"(?!)"), ())
_CONVENTIONS = (
    Convention(
        "Megatron",
        re.compile(
            r"^(?:language_model\.)?(?:decoder\.layers\.\d+\.(?:self_attention|pre_mlp_layernorm|mlp\.linear_fc)"
            r"|decoder\.final_layernorm|embedding\.word_embeddings)"
        ),
        _table(
            r"(?:language_model\.)?",
            {
                r"embedding(?:\.word_embeddings)?": r"\1model.embed_tokens",
                rf"{_LAYER}": r"\1model.layers.\2",
                rf"{_LAYER}\.input_layernorm": r"\1model.layers.\2.input_layernorm",
                rf"{_LAYER}\.pre_mlp_layernorm": r"\1model.layers.\2.post_attention_layernorm",
                rf"{_LAYER}\.self_attention": r"\1model.layers.\2.self_attn",
                rf"{_LAYER}\.self_attention\.linear_proj": r"\1model.layers.\2.self_attn.o_proj",
                rf"{_LAYER}\.self_attention\.core_attention": r"\1model.layers.\2.self_attn.attn",
                rf"{_LAYER}\.self_attention\.([qk])_layernorm": r"\1model.layers.\2.self_attn.\3_norm",
                rf"{_LAYER}\.mlp": r"\1model.layers.\2.mlp",
                rf"{_LAYER}\.mlp\.linear_fc1": r"\1model.layers.\2.mlp.gate_up_proj",
                rf"{_LAYER}\.mlp\.linear_fc2": r"\1model.layers.\2.mlp.down_proj",
                r"decoder\.final_layernorm": r"\1model.norm",
                r"output_layer": r"\1lm_head",
            },
        ),
    ),
    Convention(
        "TransformerLens",
        re.compile(r"^(?:blocks\.\d+\.hook_|hook_embed$|blocks\.\d+\.(?:attn|mlp)\.hook_|unembed$)"),
        _table(
            "",
            {
                r"(?:hook_embed|embed)": r"\1model.embed_tokens",
                r"blocks\.(\d+)(?:\.hook_resid_post)?": r"\1model.layers.\2",
                r"blocks\.(\d+)\.hook_mlp_out": r"\1model.layers.\2.mlp",
                r"blocks\.(\d+)\.hook_attn_out": r"\1model.layers.\2.self_attn",
                r"blocks\.(\d+)\.mlp\.hook_pre": r"\1model.layers.\2.mlp.gate_proj",
                r"blocks\.(\d+)\.mlp\.hook_pre_linear": r"\1model.layers.\2.mlp.up_proj",
                r"unembed": r"\1lm_head",
            },
        ),
    ),
    Convention(
        "ONNX",
        re.compile(r"^/.+_output_\d+$"),
        # Only operators that are the last of their module whatever the model: no projection here has a bias.
        (
            (
                re.compile(
                    r"^/model/layers\.(\d+)/(self_attn/o|mlp/(?:gate|up|down))_proj/(?:MatMul|Gemm)_output_0$"
                ),
                r"model.layers.\1.\2_proj",
            ),
            (re.compile(r"^(model\.layers\.\d+\.\w+)/(\w+_proj)$"), r"\1.\2"),
            (re.compile(r"^/model/embed_tokens/Gather_output_0$"), "model.embed_tokens"),
            (re.compile(r"^(?:/lm_head/MatMul_output_0|logits)$"), "lm_head"),
        ),
    ),
    Convention(
        "a model without its head",
        re.compile(r"^layers\.\d+(?:\.|$)"),
        ((re.compile(rf"{_PARAMETER}(layers\.|embed_tokens$|norm$|rotary_emb$)"), r"\1model.\2"),),
    ),
)


class Naming(NamedTuple):
    """What renames A's modules and B's, and what to tell of it."""

    a: tuple[Rename, ...]
    b: tuple[Rename, ...]
    note: str


def naming(a: Iterable[str], b: Iterable[str]) -> Naming | None:
    """The renames of two runs' modules; None where they have the same kind of names, or it pairs none."""
    modules = set(a), set(b)
    found = [_told(each) for each in modules]
    if found[0] == found[1]:
        return None
    renamed = [{apply(each, rows) for each in names} for names, (_, rows) in zip(modules, found, strict=True)]
    # The model itself has no name in any convention.
    if len(renamed[0] & renamed[1] - {""}) <= len(modules[0] & modules[1] - {""}):
        return None
    titles = " and ".join(
        f"{label}'s as {title}" for label, (title, rows) in zip("AB", found, strict=True) if rows
    )
    note = f"modules are called differently ({titles}): they are paired, and told, as transformers calls them"
    return Naming(found[0][1], found[1][1], f"{note}; --map renames in another way")


def apply(module: str, rows: Sequence[Rename]) -> str:
    """A module's name after all renames."""
    for pattern, replacement in rows:
        module = pattern.sub(replacement, module)
    return module


def _told(modules: Iterable[str]) -> tuple[str, tuple[Rename, ...]]:
    """By which convention modules are called, and the renames."""
    wrapped = (re.compile(rf"{_PARAMETER}{_WRAPPED}+"), r"\1")
    bare = [wrapped[0].sub(r"\1", each) for each in modules]
    first = (wrapped,) if bare != list(modules) else ()
    for each in _CONVENTIONS:
        if any(each.seen.search(name.removeprefix("param.")) for name in bare):
            return each.title, (*first, *each.renames)
    return "a wrapped model" if first else _PLAIN.title, first
