"""What hooks cost without the copy: a captured step of calls that do nothing, of tensors of a few bytes."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import nn

from tests.sinks import MemorySink
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.hotpath.native import in_use

from .rows import Row, Scale, at_most

MODULES = 400


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_Nothing() for _ in range(MODULES))

    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            for part in self.parts:
                x = part(x)
        return x


class _Nowhere(MemorySink):
    def write(self, batch: Any) -> None:
        """Nothing is kept."""

    def commit_step(self, step: Any) -> None:
        """Nothing is kept."""


def table(scale: Scale) -> list[Row]:
    """Microseconds of the model's thread for each side of a call, and how they grow with a step's calls."""
    few, many = {"tiny": (1, 2), "quick": (10, 25), "full": (10, 250)}[scale.name]
    one, at_few, at_many = (_side_us(times, scale) for times in (1, few, many))
    return [
        Row("hooks without the copy, a side", one, at_most(1.0), "us", f"{MODULES} calls; {in_use()}"),
        Row(
            f"the same, {many * MODULES} calls a step / {few * MODULES}",
            at_many / at_few,
            at_most(1.2),
            "",
            f"{at_many:.2f} us / {at_few:.2f} us",
        ),
    ]


def _side_us(times: int, scale: Scale) -> float:
    """The least of several steps: whatever else the machine does can only add to it."""
    model, x = _Many().eval(), torch.ones(8)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory, torch.inference_mode():
        config = load_config({"output_dir": directory, "log_step_ids": []})
        session = Session(config, new_run(config), _Nowhere())
        session.attach(model)
        plain, captured = [], []
        for _ in range(max(3, scale.repeats * 10 // times)):
            plain.append(_thread_s(model, x, times))
            session.begin_step()
            captured.append(_thread_s(model, x, times))
            session.end_step()
            session.flush()
        session.close()
    return (min(captured) - min(plain)) / (2 * MODULES * times) * 1e6


def _thread_s(model: nn.Module, x: torch.Tensor, times: int) -> float:
    begin = time.thread_time()
    model(x, times)
    return time.thread_time() - begin
