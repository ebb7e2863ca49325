"""Reading many small files in one call that leaves the interpreter to others."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from .native import extension

_ALIGNMENT = 64
_NOT_READ = -1
Identity = tuple[int, int, int, int]


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
            begin = min(-(-(begin + size) // _ALIGNMENT) * _ALIGNMENT, len(memory))
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
