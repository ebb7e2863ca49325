"""Whole captures of generated models: with and without the extension, every byte of the run is the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tlcore
from tests.deep import scaled
from tests.hotpath.halves import native
from tests.hotpath.test_bytes import TWINS
from tlcore.engine.hooks import collector
from tlcore.engine.pipeline import processor, repeating
from tlcore.hotpath.looking import can_look

# What a module makes of its argument and hands on, and what of that the next one gets.
SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda x: x,
    "tuple": lambda x: (x, x[:1], None, 3),
    "list": lambda x: [x, [x.t(), 2.5]],
    "dictionary": lambda x: {"a": x, "b": {"c": (x, "text", True)}},
    "other keys": lambda x: {1: x, (2, 3): x},
    "turned": lambda x: x.t(),
    "zeros nobody wrote": lambda x: torch._efficientzerotensor((3,)),
    "negative": lambda x: torch._neg_view(x),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "half": lambda x: x.to(torch.bfloat16),
    "small": lambda x: (x * 5).to(torch.int8),
    "nothing": lambda x: x[:0],
    "large": lambda x: x.repeat(60, 60),
    "parameter": lambda x: nn.Parameter(x.clone()),
    "many dimensions": lambda x: x.reshape((1,) * 5 + tuple(x.shape)),
    "grows": lambda x: torch.ones(int(x.sum().item()) % 7 + 1),
}


class Part(nn.Module):
    """Returns its argument in some shape; ``key`` hands it on by name."""

    def __init__(self, shape: str, key: str | None, inner: Part | None) -> None:
        super().__init__()
        self.shape, self.key, self.inner = shape, key, inner

    def forward(self, x: torch.Tensor, *more: Any, **named: torch.Tensor) -> Any:
        for each in named.values():
            x = x + each
        if self.inner is not None:
            self.inner(x) if self.key is None else self.inner(x, **{self.key: x})
        if self.shape == "fails":
            raise ValueError("as it was told to")
        return SHAPES[self.shape](x)


class Model(nn.Module):
    def __init__(self, parts: list[tuple[str, str | None, int]]) -> None:
        super().__init__()
        made: list[Part] = []
        for shape, key, depth in parts:
            made.append(Part(shape, key, made[-1] if made and depth else None))
        self.parts = nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> Any:
        for part in self.parts:
            try:
                part(x)
                part(x, x) if part.key is None else part(x, **{str(part.key): x})
            except ValueError:
                pass
            x = x + 1
        return x


def captured(parts: list[tuple[str, str | None, int]], keys: dict[str, Any]) -> dict[str, bytes]:
    """The files of a run's steps by their names, all made at the same time of the clock."""
    model = Model(parts)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "time_text", lambda _: "2000-01-01T00:00:00Z")
        with tlcore.capture(model, output_dir=directory, log_step_ids=[0, 2, 3, 5], **keys) as capture:
            for step in range(6):
                model(torch.arange(6.0).view(2, 3) + step)
        assert capture.ledger.balanced and capture.ledger.captured and not capture.ledger.failed
        files = [each for each in Path(capture.url).rglob("*") if each.is_file() and each.name != "run.json"]
        return {str(path.relative_to(capture.url)): path.read_bytes() for path in files}


def without_extension(parts: list[tuple[str, str | None, int]], keys: dict[str, Any]) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collector, "can_look", lambda: False)
        patch.setattr(repeating, "can_hash", False)
        patch.setattr(processor, "hex_digests", TWINS["hex_digests"])
        return captured(parts, keys)


NAMES = [*SHAPES, "fails"]
PARTS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from([None, "x1", "key.with/signs"]), st.integers(0, 1)),
    min_size=1,
    max_size=6,
)
SEGMENTS = {"name": "safetensors", "layout": 2, "commit_s": 600}
BACKENDS: list[Any] = ["pt", {"name": "safetensors", "layout": 1}, SEGMENTS]
ONE_OF_EACH = [(name, None if number % 2 else "x1", number % 2) for number, name in enumerate(NAMES)]
KEYS = st.fixed_dictionaries(
    {
        "backend": st.sampled_from(BACKENDS),
        "queue_bytes": st.sampled_from([1 << 12, 1 << 26]),
        "block_s": st.just(60),
        "log_post_fwd_inputs": st.booleans(),
        "max_tensor_size": st.sampled_from([None, 4]),
    }
)


@settings(max_examples=scaled(12, 300), deadline=None)
@given(PARTS, KEYS)
@example(ONE_OF_EACH, {"backend": "safetensors"})
@example(ONE_OF_EACH, {"backend": "pt", "log_post_fwd_inputs": True})
def test_both_halves_write_the_same_bytes(
    parts: list[tuple[str, str | None, int]], keys: dict[str, Any]
) -> None:
    native()
    assert can_look()
    one, other = captured(parts, keys), without_extension(parts, keys)
    assert one.keys() == other.keys()
    for name, content in one.items():
        assert content == other[name], name
