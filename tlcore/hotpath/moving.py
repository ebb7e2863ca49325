"""Writing a part of many files into another file, hashed on its way, in one call of C."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .beneath import Beneath
from .native import extension, hashes_pieces

Span = tuple[int, int, int, int]
_MOST = 2**63 - 1


def _move_payloads(
    directory: str, names: Sequence[str], spans: Any, kept: Any, room: Any, handle: int
) -> bytes:
    """Write a part of each file below ``directory`` into an open file; what is around it goes into ``kept``.

    ``spans`` holds for each file, as 64-bit integers, its size, where the part begins and ends, and where in
    the open file it goes (-1: nowhere, it is only hashed). ``kept`` has the rest of each, one file's after
    the other's, with room for each. ``room`` is memory for pieces on their way. Returns the XXH3-128 of each
    part, 16 bytes each, the highest first, up to the first file that has another size, is no regular file, is
    not reached without a symbolic link, or cannot be read: of that one and those behind it anything may stand
    at their places. Raises OSError where the open file cannot be written, ValueError for spans that make no
    sense.
    """
    names = [os.fsdecode(name) for name in names]
    with (
        memoryview(spans).cast("B") as raw,
        memoryview(kept).cast("B") as rest,
        memoryview(room).cast("B") as memory,
    ):
        if rest.readonly or memory.readonly:
            raise TypeError("what is read needs writable memory")
        if not len(memory):
            raise ValueError("there is no room to read into")
        if len(raw) != 32 * len(names):
            raise ValueError(f"{len(names)} files need as many spans of four 64-bit integers")
        all_spans: list[Span] = list(struct.iter_unpack("=qqqq", raw))
        places = _places(all_spans, len(rest))
        digests = bytearray()
        beneath = Beneath(directory)
        for name, span, at in zip(names, all_spans, places, strict=True):
            with beneath.opened(name) as opened:
                digest = None
                if opened is not None and opened[1].st_size == span[0]:
                    digest = _move(opened[0], span, rest[at:], memory, handle)
            if digest is None:
                break
            digests += digest
        return bytes(digests)


def _places(spans: Sequence[Span], room: int) -> list[int]:
    places, at = [], 0
    for number, (size, begin, end, to) in enumerate(spans):
        fits = 0 <= begin <= end <= size and size - (end - begin) <= room - at
        if not fits or not -1 <= to <= _MOST - (end - begin):
            problem = f"[{begin}, {end}) of {size} bytes, put at {to}, does not fit"
            raise ValueError(f"span {number}: {problem}")
        places.append(at)
        at += size - (end - begin)
    return places


def _move(file: int, span: Span, kept: memoryview, room: memoryview, handle: int) -> bytes | None:
    """The hash of a file's part, which is moved; None where the file ends too early."""
    size, begin, end, to = span
    hashed = xxhash.xxh3_128()
    if not _fill(file, kept[:begin]):
        return None
    for done in range(0, end - begin, len(room)):
        piece = room[: min(len(room), end - begin - done)]
        if not _fill(file, piece):
            return None
        hashed.update(piece)
        if to >= 0:
            _put(handle, piece, to + done)
    return hashed.digest() if _fill(file, kept[begin : begin + size - end]) else None


def _fill(file: int, target: memoryview) -> bool:
    done = 0
    try:
        while done < len(target) and (count := os.readv(file, [target[done:]])):
            done += count
    except OSError:
        return False
    return done == len(target)


def _put(handle: int, piece: memoryview, at: int) -> None:
    while len(piece):
        count = os.pwrite(handle, piece, at)
        piece, at = piece[count:], at + count


move_payloads: Callable[[str, Sequence[str], Any, Any, Any, int], bytes] = (
    extension.move_payloads if hashes_pieces else _move_payloads
)
