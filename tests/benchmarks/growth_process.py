"""Time per step and peak memory of a process that captures many decode steps.

``python -m tests.benchmarks.growth_process SCALE BACKEND STEPS`` prints them as one JSON line.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import tlcore

from .memory_process import forget_peak, peak_rss
from .rows import SCALES, Scale
from .subprocesses import print_report
from .workload import workload

_WARM_UP = 3


def measure(scale: Scale, backend: str, steps: int) -> dict[str, float]:
    """Decode steps captured one after the other, until everything is committed."""
    work = workload("decode", scale)
    for _ in range(_WARM_UP):
        work.forward()
    forget_peak()
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        # A bound that the longer run would reach if nothing kept pace.
        keys: dict[str, Any] = {"log_step_ids": [], "queue_bytes": 64 << 20, "block_s": 600}
        with tlcore.capture(work.model, output_dir=directory, backend=backend, **keys) as capture:
            for _ in range(_WARM_UP):
                work.forward()
            capture.session.flush()
            begin = time.perf_counter()
            for _ in range(steps):
                work.forward()
            capture.session.flush()
            seconds = time.perf_counter() - begin
        peak = peak_rss()
    return {"step_s": seconds / steps, "peak": peak}


if __name__ == "__main__":
    print_report(measure(SCALES[sys.argv[1]], sys.argv[2], int(sys.argv[3])))
