"""Reading a part of many files straight to where it belongs, and hashing it, in one call of C."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .beneath import Beneath
from .file_spans import Span, checked_spans, fill
from .native import can_hash, extension

_NOT_READ = -1
_Key = tuple[int, ...]


def _gather_payloads(
    directory: str, names: Sequence[str], spans: Any, kept: Any, target: Any
) -> tuple[bytes, bytes]:
    """Read a part of each file below ``directory`` into ``target``; what is around it goes into ``kept``.

    ``spans`` holds for each file, as 64-bit integers, its size, where the part begins and ends, and where it
    goes (-1: nowhere, it is only hashed). ``kept`` has the rest of each, one file's after the other's, with
    room for each. Returns for each file, as 64-bit integers, its own index where it was read; that of an
    earlier one where it goes nowhere and is the same file (a hard link) with the same part, of which no more
    is kept then; -1 for one that has another size, is no regular file, is not reached without a symbolic
    link, or cannot be read. And the XXH3-128 of each part, 16 bytes each, the highest first. Raises
    ValueError for spans that make no sense, or that do not fit.
    """
    names = [os.fsdecode(name) for name in names]
    with (
        memoryview(spans).cast("B") as raw,
        memoryview(kept).cast("B") as room,
        memoryview(target).cast("B") as memory,
    ):
        if room.readonly or memory.readonly:
            raise TypeError("what is read needs writable memory")
        all_spans, places = checked_spans(raw, len(names), len(room), len(memory))
        first, digests = list[int](), bytearray()
        known: dict[_Key, int] = {}
        beneath = Beneath(directory)
        for index, (name, span, at) in enumerate(zip(names, all_spans, places, strict=True)):
            _, begin, end, to = span
            same = _NOT_READ if to >= 0 else known.get(_looked_at(beneath, name, span), _NOT_READ)
            if same < 0:
                target_part = memory[to : to + end - begin] if to >= 0 else None
                found = _read(beneath, name, span, target_part, room[at:])
                if found is not None:
                    state, part = found
                    same = known[_key(state, span)] = index
                    digests += xxhash.xxh3_128_digest(part)
                else:
                    digests += bytes(16)
            else:
                digests += digests[16 * same : 16 * same + 16]
            first.append(same)
        return struct.pack(f"={len(first)}q", *first), bytes(digests)


def _looked_at(beneath: Beneath, name: str, span: Span) -> _Key:
    place = beneath.place(name)
    try:
        return () if place is None else _key(os.lstat(place), span)
    except OSError:
        return ()


def _key(state: os.stat_result, span: Span) -> _Key:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, *span[:3]


def _read(
    beneath: Beneath, name: str, span: Span, part: memoryview | None, kept: memoryview
) -> tuple[os.stat_result, memoryview] | None:
    """The file's state and its part, in memory of its own where it has none; None where it was not read."""
    size, begin, end, _ = span
    with beneath.opened(name) as opened:
        # Before any memory is taken for what cannot be there.
        if opened is None or opened[1].st_size != size:
            return None
        if part is None:
            part = memoryview(bytearray(end - begin))
        parts = kept[:begin], part, kept[begin : begin + size - end]
        if not all(fill(opened[0], each) for each in parts):
            return None
        return opened[1], part


gather_payloads: Callable[[str, Sequence[str], Any, Any, Any], tuple[bytes, bytes]] = (
    extension.gather_payloads if can_hash else _gather_payloads
)
