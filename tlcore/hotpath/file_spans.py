"""Parts of files: which of each is wanted, where it and the rest go. C has the same for its own calls."""

from __future__ import annotations

import os
import struct

# A file's size, where the part begins and ends, and where that goes (-1: nowhere).
Span = tuple[int, int, int, int]


def checked_spans(raw: memoryview, count: int, room: int, target: int) -> tuple[list[Span], list[int]]:
    """So many spans from their numbers, and where in ``room`` bytes the rest of each file is kept.

    Raises ValueError for spans that make no sense, or do not fit into that room and into ``target`` bytes.
    """
    if len(raw) != 32 * count:
        raise ValueError(f"{count} files need as many spans of four 64-bit integers")
    spans: list[Span] = list(struct.iter_unpack("=qqqq", raw))
    places, at = [], 0
    for number, (size, begin, end, to) in enumerate(spans):
        fits = 0 <= begin <= end <= size and size - (end - begin) <= room - at
        if not fits or not to >= -1 or (to >= 0 and to > target - (end - begin)):
            problem = f"[{begin}, {end}) of {size} bytes, put at {to}, does not fit"
            raise ValueError(f"span {number}: {problem}")
        places.append(at)
        at += size - (end - begin)
    return spans, places


def fill(file: int, target: memoryview) -> bool:
    """Read on from an open file; whether there was as much, and it could be read."""
    done = 0
    try:
        while done < len(target) and (count := os.readv(file, [target[done:]])):
            done += count
    except OSError:
        return False
    return done == len(target)
