"""Writing a part of many files into another file, hashed on its way, in one call of C."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .beneath import Beneath
from .file_spans import Span, checked_spans, fill
from .native import extension, hashes_pieces

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
        all_spans, places = checked_spans(raw, len(names), len(rest), _MOST)
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


def _move(file: int, span: Span, kept: memoryview, room: memoryview, handle: int) -> bytes | None:
    """The hash of a file's part, which is moved; None where the file ends too early."""
    size, begin, end, to = span
    hashed = xxhash.xxh3_128()
    if not fill(file, kept[:begin]):
        return None
    for done in range(0, end - begin, len(room)):
        piece = room[: min(len(room), end - begin - done)]
        if not fill(file, piece):
            return None
        hashed.update(piece)
        if to >= 0:
            _put(handle, piece, to + done)
    return hashed.digest() if fill(file, kept[begin : begin + size - end]) else None


def _put(handle: int, piece: memoryview, at: int) -> None:
    while len(piece):
        count = os.pwrite(handle, piece, at)
        piece, at = piece[count:], at + count


move_payloads: Callable[[str, Sequence[str], Any, Any, Any, int], bytes] = (
    extension.move_payloads if hashes_pieces else _move_payloads
)
