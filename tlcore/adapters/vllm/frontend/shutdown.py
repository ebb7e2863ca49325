"""Time for the workers to store what is queued when vLLM shuts down."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ...patching import when_imported

_VARIABLE = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"
_SECONDS = 60
# The engine waits as long for its workers, then signals those that have not heard of the end and waits 4 s
# more; whoever waits for the engine must not kill both before that.
_ENGINE_SECONDS = 15
_MARK = "__tlcore__"


def give_workers_time() -> None:
    """Let workers that are asked to stop finish by themselves, up to 60 s, and their engines after them.

    By default vLLM kills them after 0 to 5 s. Committed steps survive that; this is for the rest and
    for the run's end mark. Processes that end sooner are not waited for, and requests are aborted as
    quickly as before. A value of the environment variable that the user set stays.
    """
    os.environ.setdefault(_VARIABLE, str(_SECONDS))
    when_imported("vllm.v1.engine.utils", _patch)


def _patch(module: ModuleType) -> None:
    """Lengthen the two waits that do not look at the variable: a server's, and an interpreter's exit."""
    for name, longer in (("get_engine_process_shutdown_timeout", _for_server), ("shutdown", _at_exit)):
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, _MARK):
            wrapped = functools.wraps(original)(longer(original))
            wrapped.__dict__[_MARK] = True
            setattr(module, name, wrapped)


def _seconds() -> float:
    return float(os.environ.get(_VARIABLE) or _SECONDS)


def _for_server(original: Callable[..., Any]) -> Callable[..., Any]:
    def timeout(request_timeout: float | None, process_timeout: float | None) -> Any:
        chosen = original(request_timeout, process_timeout)
        # A positive request timeout is a deadline that the user set; only "at once" gets the wait.
        if request_timeout == 0 and process_timeout == 0:
            return max(float(chosen or 0), _seconds() + _ENGINE_SECONDS)
        return chosen

    return timeout


def _at_exit(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(processes: Any, timeout: float | None = None) -> Any:
        return original(processes, timeout=_seconds() + _ENGINE_SECONDS if timeout is None else timeout)

    return shutdown
