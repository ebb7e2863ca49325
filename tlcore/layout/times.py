"""Times as they stand in a run's documents."""

from __future__ import annotations

import datetime
from functools import lru_cache


def time_text(nanoseconds: int) -> str:
    """Nanoseconds since 1970 as ISO 8601 in UTC, with microseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06}+00:00"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
