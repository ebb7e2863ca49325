"""Copying tensors whose bytes do not lie together: the extension's copy is the one that torch makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hotpath.test_walking import Walk

_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool]


@st.composite
def _views(draw: Any) -> torch.Tensor:
    """A view of any strides, also 0 and overlapping ones, into memory that it stays inside."""
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    strides = [draw(st.integers(0, 40)) for _ in shape]
    first = draw(st.integers(0, 9))
    last = first + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True) if count)
    numbers = torch.arange(max(1, last + 1)) * 37 % 251
    return numbers.to(draw(st.sampled_from(_DTYPES))).as_strided(shape, strides, first)


def _bytes(tensor: torch.Tensor) -> list[int]:
    copy = torch.empty(tensor.numel(), dtype=tensor.dtype)
    copy.view(tensor.shape).copy_(tensor)
    values: list[int] = copy.view(torch.uint8).tolist()
    return values


@settings(max_examples=200)
@given(_views())
def test_any_strides_are_copied_as_torch_copies_them(view: torch.Tensor) -> None:
    walk = Walk()
    plain = torch.zeros(view.shape, dtype=view.dtype)
    walk.walker.flatten([plain, view, (view,)])
    assert walk.slow == 1
    for begin in walk.offsets[1:]:
        assert walk.store[begin : begin + plain.nbytes].tolist() == _bytes(view)


@pytest.mark.parametrize("kept", ["rows", "heads", "columns"])
def test_parts_of_a_larger_result_are_taken_without_python(kept: str) -> None:
    whole = torch.randn(16, 3 * 9 * 64)
    part = {
        "rows": lambda: whole[::2],
        "heads": lambda: whole[:, 576:1152].view(16, 9, 64).transpose(0, 1),
        "columns": lambda: whole.chunk(3, dim=-1)[1],
    }[kept]()
    walk = Walk(size=1 << 18)
    for _ in range(3):
        walk.walker.flatten(part)
    assert walk.slow == 1
    for begin in walk.offsets[1:]:
        assert walk.store[begin : begin + part.nbytes].tolist() == _bytes(part)


def test_what_torch_turns_faster_is_left_to_torch() -> None:
    large, small = torch.randn(256, 256).T, torch.randn(16, 16).T
    walk = Walk(size=1 << 20)
    for _ in range(3):
        walk.walker.flatten([large, small])
    assert walk.slow == 3 + 1


def test_a_large_part_is_copied_while_others_run() -> None:
    part = torch.randn(512, 2048)[:, :1024]
    walk = Walk(size=5 << 20)
    for _ in range(2):
        walk.walker.flatten(part)
    assert walk.slow == 1
    copied = walk.store[walk.offsets[1] :][: part.nbytes].view(torch.float32).view(part.shape)
    assert torch.equal(copied, part)
