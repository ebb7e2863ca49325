"""Ten times the steps: capture and reading grow in step with them, memory does not.

What grows with the steps does not depend on the model, so a toy with a few modules stands for it here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import tlcore
from tlcore.engine.capture import capture

from .rows import Row, Scale, at_most
from .subprocesses import report
from .timing import Times, interleaved, timed
from .workload import Workload, toy

TIMES = 10
MODULES = ["^1$", "^3$"]
QUEUE_BYTES = 8 << 20


def table(scale: Scale) -> list[Row]:
    """Ratios of a run with ten times the steps to a short one."""
    rows = []
    for backend in ("pt", "safetensors"):
        rows += _reading(backend, scale)
        rows += _capturing(backend, scale)
    return rows


def steps_of(scale: Scale) -> int:
    """How many steps the short run has."""
    return {"full": 200, "quick": 100, "tiny": 2}[scale.name]


def record(work: Workload, directory: str, backend: str, steps: int) -> Path:
    """Capture ``steps`` steps; the run's directory."""
    keys: dict[str, Any] = {"log_step_ids": [], "backend": backend, "module_call_match": MODULES}
    keys |= {"queue_bytes": QUEUE_BYTES, "block_s": 600}
    with capture(work.model, output_dir=directory, **keys) as running:
        for _ in range(steps):
            work.forward()
    return Path(running.url)


def _reading(backend: str, scale: Scale) -> list[Row]:
    work, steps = toy("decode", scale), steps_of(scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        short = record(work, directory, backend, steps)
        long = record(work, directory, backend, TIMES * steps)
        times = interleaved(
            {
                "open, short": lambda: timed(lambda: tlcore.open_run(short)),
                "open, long": lambda: timed(lambda: tlcore.open_run(long)),
                "list steps, short": lambda: timed(lambda: tlcore.open_run(short).steps),
                "list steps, long": lambda: timed(lambda: tlcore.open_run(long).steps),
                "read one step, short": lambda: timed(lambda: _read_step(short, steps - 1)),
                "read one step, long": lambda: timed(lambda: _read_step(long, steps - 1)),
            },
            scale.repeats,
        )
    limits = {"open": 1.5, "list steps": 1.2 * TIMES, "read one step": 1.5}
    return [_row(f"{what}, {TIMES} x the steps, {backend}", times, what, limits[what]) for what in limits]


def _read_step(run: Path, number: int) -> None:
    for _ in tlcore.open_run(run).step(number).values():
        pass


def _row(what: str, times: Times, name: str, limit: float) -> Row:
    long, short = median(times[f"{name}, long"]), median(times[f"{name}, short"])
    return Row(what, long / short, at_most(limit), "times", f"{long * 1e3:.2f} ms / {short * 1e3:.2f} ms")


def _capturing(backend: str, scale: Scale) -> list[Row]:
    """Time per step and peak memory, in a process of its own."""
    measured = report("growth_process", scale.name, backend)
    # The least that each took: whatever else the machine did can only add to it.
    wall, cpu = (
        {name: min(measured[name][key]) * 1e3 for name in ("long", "short")} for key in ("step_s", "cpu_s")
    )
    peak_long, peak_short = min(measured["long"]["peak"]), min(measured["short"]["peak"])
    return [
        Row(
            f"capture, CPU seconds per step outside the kernel, {TIMES} x the steps, {backend}",
            cpu["long"] / cpu["short"],
            at_most(1.2),
            "times",
            f"{cpu['long']:.2f} ms / {cpu['short']:.2f} ms; wall, until all is committed:"
            f" {wall['long']:.2f} ms / {wall['short']:.2f} ms",
        ),
        Row(
            f"capture, peak RSS, {TIMES} x the steps, {backend}",
            peak_long / peak_short,
            at_most(1.05),
            "times",
            f"{peak_long / (1 << 20):.1f} MiB / {peak_short / (1 << 20):.1f} MiB",
        ),
    ]
