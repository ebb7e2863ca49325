"""Copying and writing many pieces of memory in one call."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .native import extension

_WRITEV_PARTS = 1024
# As in copying.c.
_WRITE_BYTES = 1984 << 10
# Of Linux from 5.14 on; others refuse the number.
_POPULATE_READ = 22
_LEAST_TOUCHED = 64 << 10
_Numbers = np.ndarray[Any, np.dtype[np.int64]]


def _gather(target: Any, offsets: Sequence[int], parts: Sequence[Any]) -> None:
    """Copy each part (C-contiguous bytes) to its offset in ``target``, which is writable memory.

    Raises ValueError, with nothing copied, where a part would not lie inside or offsets are missing.
    """
    with memoryview(target).cast("B") as memory:
        views = [memoryview(part).cast("B") for part in parts]
        if len(offsets) != len(views):
            raise ValueError(f"{len(views)} parts need as many offsets")
        for offset, view in zip(offsets, views, strict=True):
            if not 0 <= offset <= len(memory) - len(view):
                raise ValueError(f"offset of a part: {offset} is not in [0, {len(memory) - len(view)}]")
        for offset, view in zip(offsets, views, strict=True):
            memory[offset : offset + len(view)] = view


def _write_all(handle: int, parts: Sequence[Any], direct_from: int = -1) -> int:
    """Write every part in order, in calls of a bounded size; returns the bytes written. Raises OSError.

    The extension writes so many bytes as ``direct_from`` or more, where that is not negative, past the
    system's page cache, if the file system can; the file is the same.
    """
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


class Pieces(Sequence[Any]):
    """Parts that can be told by where they lie, at less cost than each as a buffer."""

    @abstractmethod
    def places(self) -> tuple[_Numbers, _Numbers, object]:
        """The address and the size of each, and what holds the memory for as long as somebody has it."""


def _write_parts(handle: int, parts: Sequence[Any], direct_from: int = -1) -> int:
    if isinstance(parts, Pieces):
        addresses, sizes, _held = parts.places()
        return int(extension.write_places(handle, addresses, sizes, direct_from))
    return int(extension.write_all(handle, parts, direct_from))


def copy_from(target: Any, addresses: _Numbers, sizes: _Numbers) -> None:
    """Fill ``target``, writable memory, with so many bytes from each address, one after the other.

    Raises ValueError, with nothing copied, where they are not as many as it holds.
    """
    if extension is not None:
        extension.collect(target, addresses, sizes, np.arange(len(sizes)))
        return
    with memoryview(target).cast("B") as memory:
        if len(addresses) != len(sizes) or (sizes < 0).any() or int(sizes.sum()) != len(memory):
            raise ValueError("the tensors do not fill the memory exactly")
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory)) if len(memory) else 0
        for address, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(place, address, size)
            place += size


def can_write_from() -> bool:
    """Whether the system has what `write_from` needs."""
    return _writev is not None


def write_from(handle: int, addresses: _Numbers, width: int) -> None:
    """Write ``width`` bytes from each address in order. Raises OSError, EFAULT for memory that is not there.

    The system copies: what is a map of a file that others have cut off ends no process, as reading it would.
    """
    if _writev is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    count = len(addresses)
    each = max(1, _WRITE_BYTES // width)
    starts = np.arange(0, count, each)
    # What lies side by side is one piece.
    begins = np.empty(count, np.bool_)
    np.not_equal(addresses[1:] - addresses[:-1], width, out=begins[1:])
    begins[starts] = True
    firsts = np.flatnonzero(begins)
    vectors = np.empty((len(firsts), 2), np.int64)
    vectors[:, 0] = addresses[firsts]
    vectors[:-1, 1] = firsts[1:] - firsts[:-1]
    vectors[-1:, 1] = count - firsts[-1:]
    vectors[:, 1] *= width
    _touch(vectors)
    bounds = [*np.searchsorted(firsts, starts).tolist(), len(firsts)]
    for begin, end in itertools.pairwise(bounds):
        for first in range(begin, end, _WRITEV_PARTS):
            _write_vectors(handle, vectors[first : min(end, first + _WRITEV_PARTS)])


def _touch(vectors: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Have large pieces of maps in memory: where it finds a page that is not, the system begins anew.

    Each time it fills what is left of the file's new pages with zeros, which are as large as a whole write.
    """
    if _madvise is None:
        return
    for begin, length in vectors[vectors[:, 1] >= _LEAST_TOUCHED].tolist():
        first = begin & -mmap.PAGESIZE
        # Earlier systems know nothing of it, and pages that are not there are told of when they are copied.
        _madvise(ctypes.c_void_p(first), begin + length - first, _POPULATE_READ)


def _write_vectors(handle: int, vectors: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    while len(vectors):
        done = _writev(handle, ctypes.c_void_p(vectors.ctypes.data), len(vectors))
        if done < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise OSError(code, os.strerror(code))
        if done == int(vectors[:, 1].sum()):
            return
        whole, rest = _taken(vectors[:, 1], done)
        vectors = vectors[whole:]
        if rest:
            vectors[0] += rest, -rest


def _taken(lengths: np.ndarray[Any, np.dtype[np.int64]], done: int) -> tuple[int, int]:
    """How many whole parts so many bytes are, and how many bytes of the next."""
    ends = np.cumsum(lengths)
    whole = int(np.searchsorted(ends, done, "right"))
    return whole, done - (int(ends[whole - 1]) if whole else 0)


def _find(name: str, result: Any, *arguments: Any) -> Any:
    try:
        found = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = arguments, result
    return found


_writev = _find("writev", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_madvise = _find("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Memory:
    """Memory that is filled from the front: its ``address``, ``size`` and filled ``bytes``."""

    __slots__ = ("address", "bytes", "size")

    address: int
    size: int
    bytes: int


if TYPE_CHECKING:
    Memory = _Memory
else:
    Memory = extension.Memory if extension else _Memory

gather: Callable[[Any, Sequence[int], Sequence[Any]], None] = extension.gather if extension else _gather
write_all: Callable[..., int] = _write_parts if extension else _write_all
