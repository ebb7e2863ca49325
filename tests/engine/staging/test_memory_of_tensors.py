"""Tensors whose memory is not there: capture must not touch it, and the model never notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.sinks import MemorySink
from tests.toys import Holder, run


class Frees(nn.Module):
    """Gives its input's memory back after it has read it, as sharded training does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        x.untyped_storage().resize_(0)
        return y


class Passes(nn.Module):
    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.make()


def freed(shape: tuple[int, ...] = (8, 8), transposed: bool = False) -> torch.Tensor:
    tensor = torch.randn(shape).T if transposed else torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("keys", [{}, {"capture": "stats"}, {"capture": "both"}, {"max_run_bytes": 1 << 20}])
def test_freed_memory_is_skipped_with_that_reason(keys: dict[str, Any]) -> None:
    model = nn.Sequential(Frees())
    sink, captured = run(
        nn.Sequential(nn.Linear(4, 4), model), steps=2, log_step_ids=[], log_post_fwd_inputs=True, **keys
    )
    assert captured.ledger.reasons["skipped: its memory was freed by the model"] >= 2
    if not keys:
        assert "step_0/1.0/outputs_cpu" in sink.tensors and "step_0/1.0/inputs_0_cpu" in sink.tensors


@pytest.mark.parametrize("transposed", [False, True])
def test_a_result_that_has_been_freed_is_skipped(transposed: bool) -> None:
    # Twice, since the second time its form is known.
    _, captured = run(
        Holder(Passes(lambda: freed(transposed=transposed))), steps=2, log_step_ids=[], backend=MemorySink()
    )
    assert captured.ledger.skipped == 2 and captured.ledger.stored == 2


def test_a_part_of_freed_memory_is_skipped_too() -> None:
    """Its address is no NULL but an offset."""

    def part() -> torch.Tensor:
        whole = torch.randn(8, 8)
        rest = whole[5:]
        whole.untyped_storage().resize_(0)
        return rest

    intact = torch.randn(3, 8)
    given = iter([intact, part(), part()])
    _, captured = run(Holder(Passes(lambda: next(given))), steps=3, log_step_ids=[], backend=MemorySink())
    assert captured.ledger.reasons["skipped: its memory was freed by the model"] >= 2


def test_zeros_that_torch_never_writes_down_are_stored_as_zeros() -> None:
    sink, captured = run(Holder(Passes(lambda: torch._efficientzerotensor((3, 2)))), steps=2, log_step_ids=[])
    assert captured.ledger.stored == captured.ledger.captured == 4
    assert torch.equal(sink.tensors["step_1/inner/outputs_cpu"], torch.zeros(3, 2))


def test_once_max_run_bytes_is_reached_nothing_more_is_stored() -> None:
    sizes = iter([2, 100, 1, 1])
    _, captured = run(
        Holder(Passes(lambda: torch.ones(next(sizes)))), steps=4, size=1, log_step_ids=[], max_run_bytes=100
    )
    # Inputs of 8 bytes each: 8 + 8 stored, 400 refused, and everything after it.
    assert captured.ledger.bytes_stored == 24
    assert captured.ledger.reasons["skipped: max_run_bytes reached"] == 5
