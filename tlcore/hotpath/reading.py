"""Reading many small files, or hashing ranges of some, in one call that leaves the interpreter to others."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .beneath import Beneath
from .native import can_hash, extension

# Where a file begins in the buffer: a multiple of this.
FILE_ALIGNMENT = 64
_NOT_READ = -1
_LARGEST_KEPT = 16 << 20
# Who reads ahead holds two or three while the next is read: those that are waited for, or written.
_MOST_KEPT = 4
Identity = tuple[int, int, int, int]


class Scratch(threading.local):
    """Memory to read into, a few pieces a thread, each used again once nobody holds a view of it.

    New memory costs as much again as reading into it. At most ``most`` pieces are kept, of ``least`` bytes
    or more each, so that one serves as well as another.
    """

    def __init__(self, most: int = _MOST_KEPT, least: int = 0) -> None:
        self._most, self._least = most, least
        self._kept: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """At least ``size`` bytes, whatever is in them."""
        for memory in self._kept:
            if size <= len(memory) and _is_free(memory):
                return memory
        size = max(size, self._least)
        memory = bytearray(size + 1)
        del memory[-1]
        if size <= _LARGEST_KEPT:
            kept = [each for each in self._kept if len(each) >= size or not _is_free(each)]
            self._kept = kept[1 - self._most :]
            self._kept.append(memory)
        return memory


def _is_free(memory: bytearray) -> bool:
    try:
        # Refused while there is a view; the room for one more byte is always there.
        memory.append(0)
        del memory[-1]
    except BufferError:
        return False
    return True


def _read_files(target: Any, directory: str, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Read whole files below ``directory`` into ``target`` (writable memory), each at a multiple of 64.

    Returns where each begins; -1 for one that is no regular file of exactly its ``size`` bytes, is not
    reached without a symbolic link, has no relative path as its name, or cannot be read. Raises ValueError
    where the sizes do not fit into ``target`` or are not as many.
    """
    names = [os.fsdecode(name) for name in names]
    with memoryview(target).cast("B") as memory:
        if len(names) != len(sizes):
            raise ValueError(f"{len(names)} names need as many sizes")
        begins, begin = [], 0
        for size in sizes:
            if not 0 <= size <= len(memory) - begin:
                room = len(memory) - begin
                raise ValueError(f"bytes of a file, in the buffer's rest: {size} is not in [0, {room}]")
            begins.append(begin)
            begin = min(-(-(begin + size) // FILE_ALIGNMENT) * FILE_ALIGNMENT, len(memory))
        beneath = Beneath(directory)
        return [
            begin if _read_whole(beneath, name, memory[begin : begin + size]) else _NOT_READ
            for name, begin, size in zip(names, begins, sizes, strict=True)
        ]


def _read_whole(beneath: Beneath, name: str, target: memoryview) -> bool:
    with beneath.opened(name) as opened:
        if opened is None or opened[1].st_size != len(target):
            return False
        done = 0
        try:
            while done < len(target) and (count := os.readv(opened[0], [target[done:]])):
                done += count
        except OSError:
            return False
        return done == len(target)


def _hash_ranges(files: Any, ranges: Any, scratch: Any) -> list[bytes]:
    """The XXH3-128 of each range of open files, 16 bytes each, the highest first; by file.

    ``files`` holds the handle of each and how many ranges it has, ``ranges`` a begin and an end of each of
    these, as 64-bit integers; those that touch are read together. ``scratch`` is writable memory that has
    room for each of them. The digests of a file end before its first range that it does not have or that
    cannot be read. Raises ValueError for what makes no sense.
    """
    with (
        memoryview(files).cast("B") as listed,
        memoryview(ranges).cast("B") as raw,
        memoryview(scratch).cast("B") as memory,
    ):
        if memory.readonly:
            raise TypeError("what is read needs writable memory")
        if len(listed) % 16 or len(raw) % 16:
            raise ValueError("ranges, and files with how many they have, are pairs of 64-bit integers")
        pairs = list(struct.iter_unpack("=qq", raw))
        for number, (begin, end) in enumerate(pairs):
            if begin < 0 or end < begin or end - begin > len(memory):
                problem = f"[{begin}, {end}) is none of at most {len(memory)} bytes"
                raise ValueError(f"range {number}: {problem}")
        counts = list(struct.iter_unpack("=qq", listed))
        if any(count < 0 for _, count in counts) or sum(count for _, count in counts) != len(pairs):
            raise ValueError(f"the files' ranges are not {len(pairs)}")
        found = []
        for handle, count in counts:
            found.append(_hash_file(handle if abs(handle) < 1 << 31 else -1, pairs[:count], memory))
            del pairs[:count]
        return found


def _hash_file(handle: int, pairs: Sequence[tuple[int, int]], memory: memoryview) -> bytes:
    digests: list[bytes] = []
    while (at := len(digests)) < len(pairs):
        first, end = pairs[at]
        stop = at + 1
        while stop < len(pairs) and pairs[stop][0] == end and pairs[stop][1] - first <= len(memory):
            end = pairs[stop][1]
            stop += 1
        if not _read_range(handle, first, memory[: end - first]):
            break
        for begin, until in pairs[at:stop]:
            digests.append(xxhash.xxh3_128_digest(memory[begin - first : until - first]))
    return b"".join(digests)


def _read_range(handle: int, begin: int, target: memoryview) -> bool:
    done = 0
    try:
        while done < len(target) and (count := os.preadv(handle, [target[done:]], begin + done)):
            done += count
    except OSError:
        return False
    return done == len(target)


def _gather_ranges(handle: int, ranges: Any, target: Any) -> bytes:
    """Read ranges of an open file into ``target``; the XXH3-128 of each, 16 bytes each, the highest first.

    ``ranges`` holds a begin, an end and a place in ``target`` of each, as 64-bit integers; a place of -1 says
    that it is only hashed. The digests end before the first range that the file does not have or that
    cannot be read. Raises ValueError for a range that makes no sense, or is larger than all of ``target``.
    """
    with memoryview(ranges).cast("B") as raw, memoryview(target).cast("B") as memory:
        if memory.readonly:
            raise TypeError("what is read needs writable memory")
        if len(raw) % 24:
            raise ValueError("ranges with their places are three 64-bit integers")
        placed = list(struct.iter_unpack("=qqq", raw))
        for number, (begin, end, at) in enumerate(placed):
            if (
                begin < 0
                or not 0 <= end - begin <= len(memory)
                or not -1 <= at <= len(memory) - (end - begin)
            ):
                raise ValueError(f"range {number}: [{begin}, {end}), put at {at}, does not fit")
        digests: list[bytes] = []
        for begin, end, at in placed:
            part = memory[at : at + end - begin] if at >= 0 else memoryview(bytearray(end - begin))
            if not _read_range(handle, begin, part):
                break
            digests.append(xxhash.xxh3_128_digest(part))
        return b"".join(digests)


def _identities(paths: Sequence[str]) -> list[Identity | None]:
    """Device, inode, size and time of change (ns) of each path itself; None where there is nothing.

    Equal for paths that are hard links to one file, as it is now.
    """
    return [_identity(path) for path in paths]


def _identity(path: str) -> Identity | None:
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


read_files: Callable[[Any, str, Sequence[str], Sequence[int]], list[int]] = (
    extension.read_files if extension else _read_files
)
hash_ranges: Callable[[Any, Any, Any], list[bytes]] = extension.hash_ranges if can_hash else _hash_ranges
gather_ranges: Callable[[int, Any, Any], bytes] = extension.gather_ranges if can_hash else _gather_ranges
identities: Callable[[Sequence[str]], list[Identity | None]] = (
    extension.identities if extension else _identities
)
