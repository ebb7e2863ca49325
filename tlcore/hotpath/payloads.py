"""Hashing a part of many files, and keeping the rest of each, in one call that leaves the interpreter."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .beneath import Beneath
from .native import extension, hashes_pieces

_PIECE_BYTES = 256 << 10
_NOT_READ = -1
Span = tuple[int, int, int]
# What hard links of one file share: device and inode; then size, time of change, and the part asked for.
_File = tuple[int, int]
_Form = tuple[int, int, Span]


def _hash_payloads(directory: str, names: Sequence[str], spans: Any, kept: Any) -> tuple[list[int], bytes]:
    """The XXH3-128 of a part of each file below ``directory``, 16 bytes each, the highest first.

    ``spans`` holds for each file, as 64-bit integers, its size and where the part begins and ends. What is
    before and behind it is put into ``kept`` (writable memory), one file's after the other's, with room for
    each. Returns beside the hashes for each file its own index where it was read; the index of an earlier
    one that is the same file (a hard link) and has the same span, and then no more is kept of it; -1 for one
    that has another size, is no regular file, is not reached without a symbolic link, or cannot be read.
    Raises ValueError for spans that make no sense or leave more than ``kept`` holds.
    """
    names = [os.fsdecode(name) for name in names]
    with memoryview(spans).cast("B") as raw, memoryview(kept).cast("B") as room:
        if room.readonly:
            raise TypeError("what is kept needs writable memory")
        if len(raw) != 24 * len(names):
            raise ValueError(f"{len(names)} files need as many spans of three 64-bit integers")
        all_spans: list[Span] = list(struct.iter_unpack("=qqq", raw))
        places = _places(all_spans, len(room))
        first, digests = list[int](), bytearray()
        known: dict[_File | None, tuple[_Form, int]] = {}
        beneath = Beneath(directory)
        for index, (name, span, at) in enumerate(zip(names, all_spans, places, strict=True)):
            file, form = _looked_at(beneath, name, span)
            then, same = known.get(file, (None, _NOT_READ))
            if form is None or then != form:
                digest, state = _hashed(beneath, name, span, room[at:])
                same = _NOT_READ if state is None else index
                if state is not None:
                    file, form = _known_by(state, span)
                    known[file] = form, index
            else:
                digest = bytes(digests[16 * same : 16 * same + 16])
            first.append(same)
            digests += digest
        return first, bytes(digests)


def _places(spans: Sequence[Span], room: int) -> list[int]:
    places, at = [], 0
    for number, (size, begin, end) in enumerate(spans):
        if not 0 <= begin <= end <= size or size - (end - begin) > room - at:
            problem = f"[{begin}, {end}) of {size} bytes makes no sense, or leaves too many"
            raise ValueError(f"span {number}: {problem}")
        places.append(at)
        at += size - (end - begin)
    return places


def _looked_at(beneath: Beneath, name: str, span: Span) -> tuple[_File, _Form] | tuple[None, None]:
    place = beneath.place(name)
    try:
        return (None, None) if place is None else _known_by(os.lstat(place), span)
    except OSError:
        return None, None


def _known_by(state: os.stat_result, span: Span) -> tuple[_File, _Form]:
    return (state.st_dev, state.st_ino), (state.st_size, state.st_mtime_ns, span)


def _hashed(beneath: Beneath, name: str, span: Span, kept: memoryview) -> tuple[bytes, os.stat_result | None]:
    """The hash of a file's part and the file's state; None for one that was not read."""
    size, begin, end = span
    hashed, done, none = xxhash.xxh3_128(), 0, (bytes(16), None)
    with beneath.opened(name) as opened:
        if opened is None or opened[1].st_size != size:
            return none
        handle, state = opened
        while done < size:
            try:
                piece = os.read(handle, min(_PIECE_BYTES, size - done))
            except OSError:
                return none
            if not piece:
                return none
            first, last = (min(max(edge - done, 0), len(piece)) for edge in (begin, end))
            kept[done : done + first] = piece[:first]
            hashed.update(piece[first:last])
            after = begin + done + last - end
            kept[after : after + len(piece) - last] = piece[last:]
            done += len(piece)
    return hashed.digest(), state


hash_payloads: Callable[[str, Sequence[str], Any, Any], tuple[list[int], bytes]] = (
    extension.hash_payloads if hashes_pieces else _hash_payloads
)
