"""Eight small random models that faults are planted in, and how each is run on a batch of token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

VOCABULARY, LENGTH = 64, 11
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "max_position_embeddings": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1}


@dataclass(frozen=True)
class Subject:
    """A model of a kind; ``prepare`` makes it with its random weights, always the same."""

    make: Callable[[], nn.Module]
    dtype: torch.dtype = torch.float32
    call: Callable[[nn.Module, torch.Tensor], Any] = lambda model, ids: model(ids)

    def prepare(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for name, each in model.named_parameters():
                    # Wide enough that each part of the model does something.
                    if each.dim() > 1 and "embed" not in name:
                        each.mul_(4)
        return model.to(self.dtype).eval()


class Decoding(nn.Module):
    """A prompt and its last tokens, one call of the model each, with a cache between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _llama()
        self.between: Callable[[Any], None] = lambda cache: None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        cache = _transformers().DynamicCache()
        self.inner(ids[:, :-3], past_key_values=cache, use_cache=True)
        self.between(cache)
        logits: torch.Tensor = self.inner(ids[:, -3:], past_key_values=cache, use_cache=True).logits
        return logits


class Adapter(nn.Module):
    """A low-rank adapter with one pair of matrices for each name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, size, 4) / size**0.5)
        self.up = nn.Parameter(torch.randn(2, 4, size) / 16)
        self.chosen, self.scale = 0, 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.down[self.chosen] @ self.up[self.chosen] * self.scale


class AdaptedBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.base = nn.Linear(size, size)
        self.adapter = Adapter(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + torch.relu(self.base(y) + self.adapter(y))


class Adapted(nn.Module):
    """Blocks whose linear layers have adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.Sequential(*(AdaptedBlock(64) for _ in range(3)))
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.blocks(self.embed(ids)))
        return found


def _transformers() -> Any:
    """Not for every Python and torch that the fast tests run on."""
    return pytest.importorskip("transformers")


def _llama() -> nn.Module:
    known = _transformers()
    model: nn.Module = known.LlamaForCausalLM(
        known.LlamaConfig(**_SIZES, **_HEADS, **_ENDS, num_hidden_layers=3)
    )
    return model


def _mixtral() -> nn.Module:
    known = _transformers()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    model: nn.Module = known.MixtralForCausalLM(
        known.MixtralConfig(**_SIZES, **_HEADS, **_ENDS, **experts, num_hidden_layers=2)
    )
    return model


def _gpt2() -> nn.Module:
    known = _transformers()
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model: nn.Module = known.GPT2LMHeadModel(known.GPT2Config(**sizes, **_ENDS))
    return model


def _bert() -> nn.Module:
    known = _transformers()
    model: nn.Module = known.BertModel(known.BertConfig(**_SIZES, num_hidden_layers=2, num_attention_heads=4))
    return model


def _t5() -> nn.Module:
    known = _transformers()
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_heads": 4}
    model: nn.Module = known.T5ForConditionalGeneration(
        known.T5Config(**sizes, num_layers=2, num_decoder_layers=2)
    )
    return model


def _without_cache(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(ids, use_cache=False)


def _typed(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(ids, token_type_ids=(torch.arange(ids.shape[1]) > 4).long().expand_as(ids))


def _translating(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(ids, decoder_input_ids=ids.flip(1), use_cache=False)


SUBJECTS = {
    "llama": Subject(_llama, call=_without_cache),
    "llama-bfloat16": Subject(_llama, torch.bfloat16, _without_cache),
    "mixtral": Subject(_mixtral, call=_without_cache),
    "gpt2": Subject(_gpt2, call=_without_cache),
    "bert": Subject(_bert, call=_typed),
    "t5": Subject(_t5, call=_translating),
    "decoding": Subject(Decoding),
    "adapted": Subject(Adapted),
}


def token_ids(batch: int, seed: int = 0) -> torch.Tensor:
    """A batch whose first samples are always the same, of one seed."""
    found = torch.randint(2, VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(seed))
    return found[:batch]


@contextmanager
def batch_dependent_kernels() -> Iterator[None]:
    """Matrix products that add up in another order for another number of rows, as those of GPUs do.

    Those of this machine's CPU may not, so that other batches would be equal bit by bit.
    """
    plain, add = nn.functional.linear, torch.addmm

    def parts(rows: int, inner: int) -> int:
        return -(-inner // (1 + rows % 6))

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        size = parts(x.numel() // x.shape[-1], x.shape[-1])
        pieces = zip(torch.split(x, size, -1), torch.split(weight, size, -1), strict=True)
        found = sum(plain(one, other) for one, other in pieces)
        assert isinstance(found, torch.Tensor)
        return found if bias is None else found + bias

    def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        size = parts(x.shape[0], x.shape[1])
        for one, other in zip(torch.split(x, size, 1), torch.split(weight, size, 0), strict=True):
            bias = add(bias, one, other)
        return bias

    assert "input" in inspect.signature(nn.Linear.forward).parameters
    with patch.object(nn.functional, "linear", linear), patch.object(torch, "addmm", addmm):
        yield
