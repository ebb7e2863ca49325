"""Captures that follow one another fill the same memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.hotpath import new_memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system knows no spare memory")


class Grows(nn.Module):
    """Gives 40 MB that are others in each call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full((10, 1 << 20), float(self.calls), dtype=x.dtype)


def capture(tmp_path: Path, steps: int = 2) -> str:
    model = Grows()
    # In the model's thread: how much memory is in use at once must not depend on which thread is quicker.
    with tlcore.capture(
        model, inline=True, output_dir=str(tmp_path), backend="safetensors", log_step_ids=[]
    ) as captured:
        for _ in range(steps):
            model(torch.ones(1))
    return str(captured.url)


def test_the_next_capture_takes_no_new_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_memory, "_spare", [])
    capture(tmp_path)
    left = list(new_memory._spare)
    assert left and sum(size for _, size in left) <= new_memory.MOST_SPARE
    made: list[int] = []
    original = new_memory.untouched_memory

    def counted(nbytes: int) -> Any:
        made.append(nbytes)
        return original(nbytes)

    monkeypatch.setattr(new_memory, "untouched_memory", counted)
    run = tlcore.open_run(capture(tmp_path))
    found = [run.tensor(f"step_{step}/_root/outputs_cpu")[0, 0].item() for step in run.steps]
    assert found == [1, 2] and run.verify() == 4
    assert not [size for size in made if size >= new_memory.LEAST_LARGE]
    assert {id(memory) for memory, _ in left} == {id(memory) for memory, _ in new_memory._spare}
