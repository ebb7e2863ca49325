"""Peak resident memory of a process without, then with capture.

``python -m tests.benchmarks.memory_process SCALE BACKEND QUEUE_BYTES`` prints both as one JSON line.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import tlcore

from .rows import SCALES, Scale
from .subprocesses import print_report
from .workload import workload

_STEPS = 5


def peak_rss() -> int:
    """The highest resident set since `forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM")


def forget_peak() -> None:
    """Let the peak start from what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(scale: Scale, backend: str, queue_bytes: int) -> dict[str, float]:
    """Peaks in bytes of a few plain forwards, then of as many captured ones, one right after the other."""
    work = workload("prefill", scale)
    for _ in range(_STEPS):
        work.forward()
    forget_peak()
    for _ in range(_STEPS):
        work.forward()
    plain = peak_rss()
    forget_peak()
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        keys: dict[str, Any] = {"log_step_ids": [], "queue_bytes": queue_bytes, "block_s": 600}
        with tlcore.capture(work.model, output_dir=directory, backend=backend, **keys) as capture:
            for _ in range(_STEPS):
                work.forward()
        captured = peak_rss()
    counts = capture.ledger
    if counts.stored != counts.captured:
        raise RuntimeError(f"not everything was stored: {counts.to_json()}")
    return {"plain": plain, "captured": captured, "steps": _STEPS, "bytes": counts.bytes_captured // _STEPS}


if __name__ == "__main__":
    print_report(measure(SCALES[sys.argv[1]], sys.argv[2], int(sys.argv[3])))
