"""Writing many buffers to a file as fast as the system takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tlcore.protocols import Buffer

_WRITEV_PARTS = 1024
# Larger writes make Linux look for larger pieces of free memory: on ext4 they took ten times as long.
_WRITE_BYTES = 1 << 20


def write_all(handle: int, parts: Sequence[Buffer]) -> int:
    """Write every part in order, in calls of a bounded size; returns the bytes written."""
    group: list[memoryview] = []
    size = total = 0
    for part in parts:
        view = memoryview(part).cast("B")
        for begin in range(0, view.nbytes, _WRITE_BYTES):
            piece = view[begin : begin + _WRITE_BYTES]
            if size + piece.nbytes > _WRITE_BYTES or len(group) == _WRITEV_PARTS:
                _write_group(handle, group)
                group, size = [], 0
            group.append(piece)
            size += piece.nbytes
        total += view.nbytes
    _write_group(handle, group)
    return total


def _write_group(handle: int, pending: Sequence[memoryview]) -> None:
    """Write a few parts, however little the system takes at a time."""
    first = 0
    rest = list(pending)
    while first < len(rest):
        written = os.writev(handle, rest[first:])
        while first < len(rest) and written >= rest[first].nbytes:
            written -= rest[first].nbytes
            first += 1
        if written:
            rest[first] = rest[first][written:]
