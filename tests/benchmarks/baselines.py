"""Other tools that capture a model's tensors, beside tlcore: the same prefill, each in its own process."""

from __future__ import annotations

from statistics import median

from .other_tools import TOOLS
from .rows import Row, Scale
from .subprocesses import report
from .timing import added


def table(scale: Scale) -> list[Row]:
    """Time added to the forward, in times of what tlcore (safetensors) adds, and what each captures."""
    return [_row(tool, scale) for tool in TOOLS]


def _row(tool: str, scale: Scale) -> Row:
    measured = report("other_tools", tool, scale.name)
    times = measured["times"]
    extra = median(times["tool"]) - median(times["plain"])
    ours = added(times, "tlcore", "plain")
    captured = f"{measured['tensors']} tensors, {measured['bytes'] / 1e6:.0f} MB"
    figures = f"{extra * 1e3:.0f} ms / {ours * 1e3:.1f} ms; it gets {captured}"
    return Row(f"{tool} / tlcore, time added to a prefill", extra / max(ours, 1e-6), None, "times", figures)
