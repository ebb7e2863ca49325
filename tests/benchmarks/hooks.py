"""What hooks cost without the copy: a captured step of calls that do nothing, of tensors of a few bytes."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
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
# The first steps see each structure for the first time, and fetch the memory that later ones use again.
_SETTLING = 3


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
    with ExitStack() as stack:
        measured = {times: stack.enter_context(_Measured(times)) for times in (1, few, many)}
        # In turn, so that whatever else the machine does meets all of them alike.
        for _ in range(_SETTLING + scale.repeats):
            for each in measured.values():
                each.step()
        one, at_few, at_many = (measured[times].side_us for times in (1, few, many))
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


class _Measured:
    """A captured model whose step has ``times`` times as many calls as it has modules."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._plain: list[float] = []
        self._captured: list[float] = []

    def __enter__(self) -> _Measured:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tlcore-bench-"))
            config = load_config({"output_dir": directory, "log_step_ids": []})
            self._session = Session(config, new_run(config), _Nowhere())
            stack.callback(self._session.close)
            self._model, self._x = _Many().eval(), torch.ones(8)
            self._session.attach(self._model)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @torch.inference_mode()
    def step(self) -> None:
        """A step without capture, and one with it."""
        self._plain.append(self._thread_s())
        self._session.begin_step()
        self._captured.append(self._thread_s())
        self._session.end_step()
        self._session.flush()

    def _thread_s(self) -> float:
        begin = time.thread_time()
        self._model(self._x, self._times)
        return time.thread_time() - begin

    @property
    def side_us(self) -> float:
        """The least of several steps: whatever else the machine does can only add to it."""
        seconds = min(self._captured[_SETTLING:]) - min(self._plain[_SETTLING:])
        return seconds / (2 * MODULES * self._times) * 1e6
