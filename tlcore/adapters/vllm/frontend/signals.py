"""Signals that an engine hears although it waits for work.

An engine that is asked to end by a signal just before it begins to wait for the next request hears of it
only with that request: Python runs a signal's handler between two instructions, and a wait that began
after the last of them is not interrupted (33 of 46,590 signals sent within 0.1 ms of an idle wait's
beginning). vLLM then kills the engine and its workers after their grace, and a run has no end.
"""

from __future__ import annotations

import functools
import queue
from types import ModuleType
from typing import Any

_MARK = "__tlcore__"
# How late such a signal is heard; each waiting costs some microseconds as often.
_LOOK_S = 0.5


def patch_core(module: ModuleType) -> None:
    """Let each engine's loop wait for its requests in short pieces. Safe to repeat."""
    for cls in list(vars(module).values()):
        original = vars(cls).get("run_busy_loop") if isinstance(cls, type) else None
        if original is not None and not hasattr(original, _MARK):
            cls.run_busy_loop = _patient(original)


def _patient(original: Any) -> Any:
    @functools.wraps(original)
    def run_busy_loop(self: Any) -> Any:
        waiting = getattr(self, "input_queue", None)
        if isinstance(waiting, queue.Queue) and not hasattr(waiting, _MARK):
            waiting.__dict__[_MARK] = True
            waiting.__dict__["get"] = hearing(waiting)
        return original(self)

    run_busy_loop.__dict__[_MARK] = True
    return run_busy_loop


def hearing(waiting: queue.Queue[Any]) -> Any:
    """The queue's ``get``, which lets signals be heard while it waits without an end."""
    get = waiting.get

    def in_pieces(block: bool = True, timeout: float | None = None) -> Any:
        while block and timeout is None:
            try:
                return get(True, _LOOK_S)
            except queue.Empty:
                continue
        return get(block, timeout)

    return in_pieces
