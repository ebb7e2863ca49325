"""The HTML report on two runs in its own process: ``python -m tests.benchmarks.report_process A B FILE``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tlcore
from tlcore.analysis.report import page

from .memory_process import peak_rss
from .subprocesses import print_report


def main(a: str, b: str, file: str) -> None:
    """Compare, make the page, and print what each took of the processor."""
    began, before = time.process_time(), peak_rss()
    comparison = tlcore.compare(a, b)
    compared, used = time.process_time(), peak_rss()
    Path(file).write_text(page(comparison), encoding="utf-8")
    made = time.process_time()
    print_report(
        {
            "tensors": len(comparison.results),
            "compare": compared - began,
            "page": made - compared,
            "before": before,
            "compared": used,
            "peak": peak_rss(),
        }
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
