"""How busy other processes keep the machine meanwhile: a ratio measured beside them says less."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)


class Others:
    """From its making on, how many cores are taken by processes that are not ours."""

    def __init__(self) -> None:
        self._begin = (time.monotonic(), _busy_s(), _own_s())

    def cores(self) -> float | None:
        """The mean number of cores; None where the system does not tell."""
        begin, busy, own = self._begin
        now = _busy_s()
        if busy is None or now is None:
            return None
        return max(0.0, (now - busy - (_own_s() - own)) / (time.monotonic() - begin))


def _busy_s() -> float | None:
    if not _STAT.exists():
        return None
    fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(count for index, count in enumerate(fields) if index not in _IDLE)
    return busy / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
