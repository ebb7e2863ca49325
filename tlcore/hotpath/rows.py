"""Reading rows of many files straight to where they belong, in one call that leaves the interpreter."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from .beneath import Beneath
from .native import extension

_MOST_PARTS = 256
Piece = tuple[int, int, int, int]


def _read_rows(
    directory: str, names: Sequence[str], size: int, head: bytes, pieces: Any, target: Any
) -> bytes:
    """Read rows of files below ``directory`` to their places in ``target``, a writable matrix of bytes.

    Each file has ``size`` bytes, of which the first are ``head`` and those behind it rows as wide as the
    target's. ``pieces`` are four 64-bit integers each: the number of a file, which ascends, its first row
    that is wanted, the row of ``target`` where it goes, and how many rows follow one another in both.
    Returns a byte for each file: 1 where its pieces were read, 0 for one that has none, has another size or
    another head, is no regular file, is not reached without a symbolic link, or cannot be read; what is at
    its places then is anything. Raises ValueError for pieces that do not fit.
    """
    names = [os.fsdecode(name) for name in names]
    matrix = np.asarray(target)
    if matrix.ndim != 2 or matrix.itemsize != 1 or (matrix.shape[1] > 1 and matrix.strides[1] != 1):
        raise ValueError("rows are put into a matrix of bytes")
    if not matrix.flags.writeable:
        raise ValueError("what is read needs writable memory")
    raw = memoryview(pieces).tobytes()
    if size < len(head) or len(raw) % 32:
        raise ValueError("files are as long as their head, and pieces four 64-bit integers")
    all_pieces: list[Piece] = list(struct.iter_unpack("=qqqq", raw))
    width = matrix.shape[1]
    _check(all_pieces, len(names), (size - len(head)) // width if width else 0, matrix.shape[0])
    read, beneath = bytearray(len(names)), Beneath(directory)
    for number, own in groupby(all_pieces, key=lambda piece: piece[0]):
        with beneath.opened(names[number]) as opened:
            if opened is not None and opened[1].st_size == size:
                read[number] = _read_file(opened[0], head, list(own), matrix)
    return bytes(read)


def _check(pieces: Sequence[Piece], files: int, rows: int, target: int) -> None:
    last = 0
    for index, (file, row, at, count) in enumerate(pieces):
        fits = last <= file < files and count >= 0 and 0 <= row <= rows - count and 0 <= at <= target - count
        if not fits:
            what = f"{count} rows from {row} on of file {file}, put at {at}, do not fit"
            raise ValueError(f"piece {index}: {what}")
        last = file


def _read_file(handle: int, head: bytes, pieces: Sequence[Piece], matrix: Any) -> bool:
    width = matrix.shape[1]
    try:
        if os.pread(handle, len(head), 0) != head:
            return False
        for _, row, at, count in pieces:
            for begin in range(0, count, _MOST_PARTS):
                rows = matrix[at + begin : at + min(count, begin + _MOST_PARTS)]
                if not _fill(handle, len(head) + (row + begin) * width, [each.data for each in rows]):
                    return False
    except OSError:
        return False
    return True


def _fill(handle: int, offset: int, parts: list[memoryview]) -> bool:
    """Fill the parts with what lies in a file from ``offset`` on, however little comes at a time."""
    while parts:
        count = os.preadv(handle, parts, offset)
        offset += count
        while parts and count >= parts[0].nbytes:
            count -= parts.pop(0).nbytes
        if parts and not count:
            return False
        if count:
            parts[0] = parts[0][count:]
    return True


read_rows: Callable[[str, Sequence[str], int, bytes, Any, Any], bytes] = (
    extension.read_rows if extension else _read_rows
)
