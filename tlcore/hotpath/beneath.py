"""Files below a directory that no symbolic link leads to; many small ones read in one call."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .native import extension

_NO_NAMES = frozenset(("", ".", ".."))


class Beneath:
    """Opens regular files below ``directory``."""

    def __init__(self, directory: str) -> None:
        self._root = os.path.realpath(directory)
        self._straight: dict[str, bool] = {"": True}

    def place(self, name: str) -> str | None:
        """The path of a name; None where a part of it is none."""
        if "\0" in name:
            raise ValueError("embedded null byte")
        return f"{self._root}/{name}" if _NO_NAMES.isdisjoint(name.split("/")) else None

    def _straight_place(self, name: str) -> str | None:
        """The same; None also where a link may lead elsewhere."""
        place, parent = self.place(name), name.rpartition("/")[0]
        if place is None:
            return None
        if parent not in self._straight:
            path = f"{self._root}/{parent}"
            self._straight[parent] = os.path.realpath(path) == path
        return place if self._straight[parent] else None

    def directory(self, name: str) -> str | None:
        """The path of a directory; None where a part of its name is none, or a link may lead elsewhere."""
        place = self.place(name)
        return place if place is not None and os.path.realpath(place) == place else None

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, os.stat_result] | None]:
        """A handle of a regular file and its state; None for all else."""
        place, handle, found = self._straight_place(name), None, None
        try:
            if place is not None:
                handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                state = os.fstat(handle)
                found = (handle, state) if stat.S_ISREG(state.st_mode) else None
        except OSError:
            pass
        try:
            yield found
        finally:
            if handle is not None:
                os.close(handle)


def _read_texts(directory: str, names: Sequence[str], most: int) -> list[bytes | None]:
    """The bytes of whole small files below ``directory``, together at most ``most``.

    None for one that is no regular file, is not reached without a symbolic link, has no relative path as
    its name, cannot be read, or no longer fits.
    """
    if not 0 <= most < 1 << 61:
        raise ValueError(f"most bytes of texts: {most} is too many or too few")
    beneath, left = Beneath(directory), most
    found: list[bytes | None] = []
    for name in map(os.fsdecode, names):
        text = None
        with beneath.opened(name) as opened:
            if opened is not None and opened[1].st_size <= left:
                text = _whole(*opened)
        left -= len(text or b"")
        found.append(text)
    return found


def _whole(handle: int, state: os.stat_result) -> bytes | None:
    text = b""
    try:
        while len(text) < state.st_size and (more := os.read(handle, state.st_size - len(text))):
            text += more
    except OSError:
        return None
    return text if len(text) == state.st_size else None


def _count_entries(directory: str, names: Sequence[str]) -> int:
    """How many names the directories below ``directory`` have together; -1 where one cannot be listed.

    None is reached through a symbolic link.
    """
    beneath, total = Beneath(directory), 0
    places = [beneath.directory(name) for name in map(os.fsdecode, names)]
    try:
        for place in places:
            total += len(os.listdir(place)) if place is not None else -1 << 62
    except OSError:
        return -1
    return max(total, -1)


def _list_files(directory: str, name: str) -> list[str] | None:
    """The names below ``directory`` of all regular files below its directory ``name``, in any order.

    None where one of these cannot be listed, or is reached through a symbolic link; a directory that is
    missing has none, but ``directory`` must be there.
    """
    beneath, found, waiting = Beneath(directory), list[str](), [os.fsdecode(name)]
    if not os.path.isdir(directory):
        return None
    try:
        for each in waiting:
            place = beneath.directory(each)
            if place is None:
                return None
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        if entry.is_file(follow_symlinks=False):
                            found.append(f"{each}/{entry.name}")
                        elif entry.is_dir(follow_symlinks=False):
                            waiting.append(f"{each}/{entry.name}")
            except (FileNotFoundError, NotADirectoryError):
                continue
    except OSError:
        return None
    return found


count_entries: Callable[[str, Sequence[str]], int] = extension.count_entries if extension else _count_entries
list_files: Callable[[str, str], list[str] | None] = extension.list_files if extension else _list_files
read_texts: Callable[[str, Sequence[str], int], list[bytes | None]] = (
    extension.read_texts if extension else _read_texts
)
