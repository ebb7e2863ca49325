"""`tlcore export --format requests` of a local run, against copying the run's files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import tlcore
from tlcore.runs.export.export import export

from .dataset import NAME, STEP_BYTES, captured
from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed


def table(scale: Scale) -> list[Row]:
    """Requests of 512 tokens and 2 MiB each."""
    steps = {"full": 32, "quick": 16, "tiny": 1}[scale.name]
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        url = captured(str(directory / "runs"), "safetensors", steps)

        def removed(target: Path, call: Callable[[], object]) -> float:
            seconds = timed(call)
            shutil.rmtree(target)
            return seconds

        what = "requests", [NAME]
        run, copy, states = tlcore.open_run(url), directory / "copy", directory / "states"
        times = interleaved(
            {
                "export": lambda: removed(states, lambda: export(run, states, *what, loss="all")),
                "copy": lambda: removed(copy, lambda: shutil.copytree(url, copy)),
            },
            max(2, scale.repeats // 2),
        )
    shown = " / ".join(f"{min(times[each]) * 1e3:.0f}" for each in ("export", "copy"))
    detail = f"{shown} ms; {steps * STEP_BYTES / 1e6:.0f} MB"
    named = "export --format requests / copying the run's files"
    return [Row(named, ratio(times, "export", "copy"), at_most(1.5), "times", detail)]
