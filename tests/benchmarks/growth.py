"""Ten times the steps: capture and reading grow in step with them, memory does not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import tlcore
from tlcore.session import capture

from .rows import Row, Scale, at_most
from .subprocesses import report
from .timing import interleaved, timed
from .workload import Workload, workload

_TIMES = 10


def table(scale: Scale) -> list[Row]:
    """Ratios of a run with ten times the steps to a short one."""
    rows = []
    for backend in ("pt", "safetensors"):
        rows += _reading(backend, scale)
        rows += _capturing(backend, scale)
    return rows


def _steps(scale: Scale) -> int:
    return {"full": 20, "quick": 8, "tiny": 1}[scale.name]


def _record(work: Workload, directory: Path, backend: str, steps: int) -> Path:
    with capture(work.model, output_dir=str(directory), log_step_ids=[], backend=backend) as running:
        for _ in range(steps):
            work.forward()
    return Path(running.url)


def _reading(backend: str, scale: Scale) -> list[Row]:
    work = workload("decode", scale)
    steps = _steps(scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        short = _record(work, Path(name), backend, steps)
        long = _record(work, Path(name), backend, _TIMES * steps)
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
    return [
        _row(f"{what}, {_TIMES} x the steps / short run, {backend}", times, what, limit)
        for what, limit in (("open", 1.5), ("list steps", 1.2 * _TIMES), ("read one step", 1.5))
    ]


def _read_step(run: Path, number: int) -> None:
    for _ in tlcore.open_run(run).step(number).values():
        pass


def _row(what: str, times: dict[str, list[float]], name: str, limit: float) -> Row:
    long, short = median(times[f"{name}, long"]), median(times[f"{name}, short"])
    return Row(what, long / short, at_most(limit), "times", f"{long * 1e3:.2f} ms / {short * 1e3:.2f} ms")


def _capturing(backend: str, scale: Scale) -> list[Row]:
    """Time per step and peak memory, each run in a process of its own."""
    steps = _steps(scale)
    results: dict[str, list[dict[str, float]]] = {"short": [], "long": []}
    for _ in range(3 if scale.name == "full" else 1):
        results["short"].append(report("growth_process", scale.name, backend, str(steps)))
        results["long"].append(report("growth_process", scale.name, backend, str(_TIMES * steps)))
    time = {name: median(each["step_s"] for each in found) for name, found in results.items()}
    peak = {name: median(each["peak"] for each in found) for name, found in results.items()}
    return [
        Row(
            f"capture, seconds per step, {_TIMES} x the steps / short run, {backend}",
            time["long"] / time["short"],
            at_most(1.2),
            "times",
            f"{time['long'] * 1e3:.1f} ms / {time['short'] * 1e3:.1f} ms",
        ),
        Row(
            f"capture, peak RSS, {_TIMES} x the steps / short run, {backend}",
            peak["long"] / peak["short"],
            at_most(1.05),
            "times",
            f"{peak['long'] / (1 << 20):.0f} MiB / {peak['short'] / (1 << 20):.0f} MiB",
        ),
    ]
