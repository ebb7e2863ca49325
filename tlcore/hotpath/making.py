"""Making many small files below a directory in one call that leaves the interpreter to others."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .beneath import Beneath
from .native import extension

FILE_MODE, FOLDER_MODE = 0o600, 0o700
# Where hard links cannot be had.
NO_HARD_LINKS = frozenset({errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP})
_ROW = struct.Struct("=7q")
# Of a file that is one of its own.
NO_LINK = -1
Row = tuple[int, int, int, int, int, int, int]


def _make_files(
    directory: str, folders: Sequence[str], names: Sequence[str], rows: Any, texts: Any, data: Any
) -> None:
    """Make ``folders`` and then files below ``directory``, none of which is there.

    ``rows`` holds for each file, as 64-bit integers, the ranges of ``texts``, of ``data`` and again of
    ``texts`` that it consists of one after the other; and the number of an earlier file, of which it is a
    hard link instead (with the same bytes where the system refuses), or -1. Raises OSError as the system
    does, with some files made; ValueError for parts that are not there.
    """
    folders, names = list(map(os.fsdecode, folders)), list(map(os.fsdecode, names))
    with (
        memoryview(rows).cast("B") as raw,
        memoryview(texts).cast("B") as text,
        memoryview(data).cast("B") as payload,
    ):
        if len(raw) != _ROW.size * len(names):
            raise ValueError(f"{len(names)} files need as many rows of seven 64-bit integers")
        all_rows: list[Row] = list(_ROW.iter_unpack(raw))
        for number, row in enumerate(all_rows):
            if not _is_sound(number, row, all_rows, len(text), len(payload)):
                raise ValueError(f"file {number} has parts that are not there")
        beneath = Beneath(directory)
        places = [(name, beneath.place(name)) for name in (*folders, *names)]
        if not os.path.isdir(directory):
            raise _error(errno.ENOENT, directory)
        for name, place in places[: len(folders)]:
            _tried(name, place, partial(os.mkdir, mode=FOLDER_MODE))
        for number, (name, place) in enumerate(places[len(folders) :]):
            row = all_rows[number]
            same = places[len(folders) + row[6]][1] if row[6] != NO_LINK else None
            if same is not None and _tried(name, place, partial(_link, same)):
                continue
            begin, end, first, last, then, until = all_rows[row[6]][:6] if row[6] != NO_LINK else row[:6]
            _tried(name, place, partial(_write, [text[begin:end], payload[first:last], text[then:until]]))


def _is_sound(number: int, row: Row, rows: Sequence[Row], texts: int, data: int) -> bool:
    same = row[6]
    if same != NO_LINK and not (0 <= same < number and rows[same][6] == NO_LINK):
        return False
    ranges = ((row[0], row[1], texts), (row[2], row[3], data), (row[4], row[5], texts))
    return all(0 <= begin <= end <= room for begin, end, room in ranges)


def _tried(name: str, place: str | None, make: Callable[[str], Any]) -> Any:
    if place is None:
        raise _error(errno.EINVAL, name)
    try:
        return make(place)
    except OSError as error:
        raise _error(error.errno or errno.EIO, name) from None


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)


def _link(origin: str, place: str) -> bool:
    try:
        os.link(origin, place, follow_symlinks=False)
    except OSError as error:
        if error.errno in NO_HARD_LINKS:
            return False
        raise
    return True


def _write(parts: Sequence[memoryview], path: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, FILE_MODE)
    try:
        for part in parts:
            while part:
                part = part[os.write(handle, part) :]
    finally:
        os.close(handle)


make_files: Callable[[str, Sequence[str], Sequence[str], Any, Any, Any], None] = (
    extension.make_files if extension else _make_files
)
