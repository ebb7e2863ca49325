"""Time for the workers to store what is queued when vLLM shuts down."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

from .importing import when_imported

_VARIABLE = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"
_SECONDS = 60


def give_workers_time() -> None:
    """Let engine and worker processes that are asked to stop finish by themselves, up to 60 s.

    By default vLLM kills them after 0 to 5 s. Committed steps survive that; this is for the rest and
    for the run's end mark. Processes that end sooner are not waited for.
    """
    os.environ.setdefault(_VARIABLE, str(_SECONDS))
    when_imported("vllm.v1.engine.utils", _patch)


def _patch(module: ModuleType) -> None:
    original = getattr(module, "get_engine_process_shutdown_timeout", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def timeout(request_timeout: float | None, process_timeout: float | None) -> Any:
        """Requests are still aborted at once; only the wait before the kill is longer."""
        seconds = original(request_timeout, process_timeout)
        if request_timeout == 0 and process_timeout == 0:
            return max(float(seconds or 0), float(os.environ.get(_VARIABLE, _SECONDS)))
        return seconds

    module.__dict__["get_engine_process_shutdown_timeout"] = timeout
