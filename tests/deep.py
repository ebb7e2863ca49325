"""How far a test goes: a short form in daily runs, the full one in ``make test-deep``."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

DEEP = os.environ.get("TLCORE_DEEP", "") not in ("", "0")


def scaled(short: T, full: T) -> T:
    """``full`` in ``make test-deep`` (the environment variable ``TLCORE_DEEP``), else ``short``."""
    return full if DEEP else short
