"""One decode step of eight requests with all modules captured, under transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from .capturing import capturing, forward_saving_s, forward_with_idle_hooks_s
from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed
from .workload import workload


def table(scale: Scale) -> list[Row]:
    """The slowdown of single captured steps, each written before the next begins."""
    work = workload("decode", scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        with (
            capturing(work, directory, backend="pt") as pt,
            capturing(work, directory, backend="safetensors") as safetensors,
        ):
            times = interleaved(
                {
                    "plain": lambda: timed(work.forward),
                    "no-op hooks": lambda: forward_with_idle_hooks_s(work),
                    "pt": pt.forward_s,
                    "safetensors": safetensors.forward_s,
                    "synchronous torch.save": lambda: forward_saving_s(work, directory),
                },
                2 * scale.repeats,
            )
    return [
        Row(
            f"a single decode step (transformers), {name} / plain",
            ratio(times, name, "plain"),
            at_most(1.15) if name == "safetensors" else None,
            "",
            f"{median(times[name]) * 1e3:.1f} ms / {median(times['plain']) * 1e3:.1f} ms",
        )
        for name in times
        if name != "plain"
    ]
