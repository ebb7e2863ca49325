"""A 256-token prefill with all modules captured, under vLLM (eager)."""

from __future__ import annotations

from .prefill import added_rows
from .rows import Row, Scale
from .subprocesses import report


def table(scale: Scale) -> list[Row]:
    """Time added to the step."""
    measured = report("vllm_engine", "prefill", scale.name)
    return added_rows(measured["times"], " under vLLM", measured["bytes"])
