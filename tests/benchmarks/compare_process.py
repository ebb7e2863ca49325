"""Compares two runs in a process of its own: ``python -m tests.benchmarks.compare_process A B``."""

from __future__ import annotations

import sys

import tlcore

from .memory_process import peak_rss
from .subprocesses import print_report

if __name__ == "__main__":
    tlcore.compare(sys.argv[1], sys.argv[2])
    print_report({"peak": peak_rss()})
