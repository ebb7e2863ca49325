"""A process that captures a small model, made to be killed: ``python -m tests.faults.worker``.

It loads everything once and then forks a child for each line of JSON on standard input, so that a
hundred deaths cost seconds. Each child gets a job: the ``keys`` of the capture, and how it ``ends``.
The child's process id, each step that is stored, and how the child ended go to standard output.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tlcore

# So that even the safetensors and S3 paths are loaded before the first fork.

MODULES = 10
# A child that nobody kills ends by itself.
_LONGEST_S = 30.0


class Stops(nn.Module):
    """Passes its input on, or raises once told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x + 1


def tell(**what: Any) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def step(model: nn.Module, number: int) -> None:
    model(torch.full((32, 32), float(number)))


def stored_steps(captured: tlcore.capture, model: nn.Module, count: int) -> None:
    """Run steps one after the other, and tell of each once it is stored."""
    for number in range(count):
        step(model, number)
        captured.session.flush()
        tell(stored=number)


def forever(captured: tlcore.capture, model: nn.Module, pause_s: float) -> None:
    end = time.monotonic() + _LONGEST_S
    number = 0
    while time.monotonic() < end:
        step(model, number)
        if number % 3 == 2:
            captured.session.flush()
            tell(stored=number)
        number += 1
        time.sleep(pause_s)


def without_close(captured: tlcore.capture, model: nn.Module) -> None:
    """The interpreter ends with the capture open and a step just handed over."""
    stored_steps(captured, model, 2)
    step(model, 2)


def interrupted(captured: tlcore.capture, model: nn.Module) -> None:
    """Ctrl-C, nobody catches it, nobody closes."""
    without_close(captured, model)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def model_raises(captured: tlcore.capture, model: nn.Module) -> None:
    """An exception in the middle of a forward pass leaves the ``with`` block."""
    stored_steps(captured, model, 2)
    with captured_block(captured):
        model[MODULES // 2].error = ValueError("on purpose")  # type: ignore[index]
        step(model, 2)


class captured_block:  # noqa: N801 - it stands for the with statement of a capture entered before
    def __init__(self, captured: tlcore.capture) -> None:
        self._captured = captured

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: Any) -> None:
        self._captured.__exit__(*error)


def forks(captured: tlcore.capture, model: nn.Module) -> None:
    """A child of the captured process runs the model too, and ends as any program; so does the parent."""
    stored_steps(captured, model, 2)
    child = os.fork()
    step(model, 2)
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        captured.__exit__(None, None, None)


ENDINGS: dict[str, Callable[[tlcore.capture, nn.Module], None]] = {
    "forever": functools.partial(forever, pause_s=0.01),
    "forever, slowly": functools.partial(forever, pause_s=0.1),
    "without_close": without_close,
    "interrupted": interrupted,
    "model_raises": model_raises,
    "forks": forks,
}


def work(job: dict[str, Any]) -> None:
    """What the child does."""
    model = nn.Sequential(*[Stops() for _ in range(MODULES)])
    captured = tlcore.capture(model, module_call_match=".", log_step_ids=[], **job["keys"])
    captured.__enter__()
    tell(url=captured.url)
    ENDINGS[job["ends"]](captured, model)


def main() -> None:
    """Fork a child for each job, one after the other."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(json.loads(line))
            return
        tell(pid=child)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        tell(ended=status)


if __name__ == "__main__":
    main()
