"""A 256-token prefill with all modules captured, under vLLM (eager)."""

from __future__ import annotations

from statistics import median

from .rows import Row, Scale, at_least, at_most
from .subprocesses import report
from .timing import added


def table(scale: Scale) -> list[Row]:
    """Time added to the step."""
    measured = report("vllm_engine", "prefill", scale.name)
    times = measured["times"]
    memcpy = median(times["memcpy"])
    saving = added(times, "synchronous torch.save", "plain")
    rows = []
    for backend in ("pt", "safetensors"):
        extra = added(times, backend, "plain")
        captured, plain = median(times[backend]), median(times["plain"])
        figures = f"{captured * 1e3:.1f} ms - {plain * 1e3:.1f} ms, memcpy {memcpy * 1e3:.1f} ms"
        what = f"{measured['tensors']} tensors, {measured['bytes'] / 1e6:.0f} MB"
        rows += [
            Row(
                f"added to a captured prefill under vLLM, {backend}",
                extra / memcpy,
                at_most(2.0),
                "memcpys",
                f"{figures}; {what}",
            ),
            Row(
                f"synchronous torch.save / {backend} under vLLM, time added",
                saving / max(extra, 1e-6),
                at_least(15),
                "times",
                f"{saving * 1e3:.0f} ms / {extra * 1e3:.1f} ms",
            ),
        ]
    return rows
