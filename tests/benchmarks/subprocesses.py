"""Measurements in a process of their own, which prints its result as one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY

_MARK = "REPORT "


def report(module: str, *arguments: str, timeout_s: float = 900) -> Any:
    """What ``python -m tests.benchmarks.<module> ARGUMENTS`` printed after ``REPORT``.

    Raises RuntimeError with the end of its output when it printed no report.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}", *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def print_report(result: Any) -> None:
    """Print what `report` waits for."""
    sys.stdout.write(f"{_MARK}{json.dumps(result)}\n")
