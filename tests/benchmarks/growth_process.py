"""Time per step and peak memory of a process that captures a few, and ten times as many, steps.

``python -m tests.benchmarks.growth_process SCALE BACKEND`` prints them as one JSON line.
"""

from __future__ import annotations

import sys
import tempfile
import time
from resource import RUSAGE_SELF, getrusage

import torch

from .growth import TIMES, record, steps_of
from .memory_process import forget_peak, peak_rss
from .rows import SCALES, Scale
from .subprocesses import print_report
from .workload import toy

_REPEATS = 3


def measure(scale: Scale, backend: str) -> dict[str, dict[str, list[float]]]:
    """``step_s`` and ``cpu_s`` in seconds, ``peak`` in bytes, of the short and the long run in turn.

    ``cpu_s`` leaves the kernel out: what new memory for the files costs depends on the machine, and how much
    of it was used before. The system takes samples of it, so the short run is made as often as it goes into
    the long one.
    """
    # More threads of the model would spin while they wait, and that is counted too.
    torch.set_num_threads(1)
    work = toy("decode", scale)
    few = steps_of(scale)
    found: dict[str, dict[str, list[float]]] = {
        name: {"step_s": [], "cpu_s": [], "peak": []} for name in ("short", "long")
    }
    for number in range(-1, _REPEATS):
        for name, runs, steps in (("short", TIMES, few), ("long", 1, TIMES * few)):
            forget_peak()
            begin, begin_cpu = time.perf_counter(), getrusage(RUSAGE_SELF).ru_utime
            for _ in range(runs):
                with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
                    record(work, directory, backend, steps)
            if number >= 0:
                found[name]["step_s"].append((time.perf_counter() - begin) / (TIMES * few))
                found[name]["cpu_s"].append((getrusage(RUSAGE_SELF).ru_utime - begin_cpu) / (TIMES * few))
                found[name]["peak"].append(peak_rss())
    return found


if __name__ == "__main__":
    print_report(measure(SCALES[sys.argv[1]], sys.argv[2]))
