"""Models of very many modules: what a capture keeps grows with them, and not with their square."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import torch
from torch import nn

import tlcore


class Many(nn.Module):
    """Calls each of its modules with a number of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity() for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row, part in zip(x, self.parts, strict=True):
            part(row)
        return x


def bytes_for(count: int, directory: Path) -> int:
    """What is allocated at most while so many modules are captured in two steps; the queue does not count."""
    model = Many(count)
    tracemalloc.start()
    try:
        with tlcore.capture(
            model, output_dir=str(directory), backend="safetensors", log_step_ids=[]
        ) as captured:
            for step in range(2):
                model(torch.full((count, 2), float(step)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert captured.ledger.stored == captured.ledger.captured == 2 * (2 * count + 2)
    return peak


def test_memory_grows_with_the_modules(tmp_path: Path) -> None:
    bytes_for(10, tmp_path)
    few, many = bytes_for(200, tmp_path), bytes_for(800, tmp_path)
    assert many < 6 * few
