"""Reading many small files in one call that leaves the interpreter to others."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .native import extension

# Where a file begins in the buffer: a multiple of this.
FILE_ALIGNMENT = 64
_NOT_READ = -1
_LARGEST_KEPT = 16 << 20
Identity = tuple[int, int, int, int]


class Scratch(threading.local):
    """Memory to read into, one piece a thread, used again once nobody holds a view of it.

    New memory costs as much again as reading into it.
    """

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, size: int) -> bytearray:
        """At least ``size`` bytes, whatever is in them."""
        try:
            # Refused while there is a view; the room for one more byte is always there.
            self._memory.append(0)
            del self._memory[-1]
            if size <= len(self._memory):
                return self._memory
        except BufferError:
            pass
        memory = bytearray(size + 1)
        del memory[-1]
        if size <= _LARGEST_KEPT:
            self._memory = memory
        return memory


def _read_files(target: Any, paths: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Read whole files into ``target`` (writable memory), one after the other, each at a multiple of 64.

    Returns where each begins; -1 for one that is no regular file of exactly its ``size`` bytes, is a symbolic
    link, or cannot be read. Raises ValueError where the sizes do not fit into ``target`` or are not as many.
    """
    with memoryview(target).cast("B") as memory:
        if len(paths) != len(sizes):
            raise ValueError(f"{len(paths)} paths need as many sizes")
        begins, begin = [], 0
        for size in sizes:
            if not 0 <= size <= len(memory) - begin:
                room = len(memory) - begin
                raise ValueError(f"bytes of a file, in the buffer's rest: {size} is not in [0, {room}]")
            begins.append(begin)
            begin = min(-(-(begin + size) // FILE_ALIGNMENT) * FILE_ALIGNMENT, len(memory))
        return [
            begin if _read_whole(path, memory[begin : begin + size]) else _NOT_READ
            for path, begin, size in zip(paths, begins, sizes, strict=True)
        ]


def _read_whole(path: str, target: memoryview) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        state, done = os.fstat(handle), 0
        if not stat.S_ISREG(state.st_mode) or state.st_size != len(target):
            return False
        while done < len(target) and (count := os.readv(handle, [target[done:]])):
            done += count
        return done == len(target)
    except OSError:
        return False
    finally:
        os.close(handle)


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


read_files: Callable[[Any, Sequence[str], Sequence[int]], list[int]] = (
    extension.read_files if extension else _read_files
)
identities: Callable[[Sequence[str]], list[Identity | None]] = (
    extension.identities if extension else _identities
)
