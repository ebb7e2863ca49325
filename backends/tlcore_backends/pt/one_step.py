"""A step that is written by itself: its files are made in a directory that appears when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby, pairwise

import numpy as np

from tlcore.hotpath.making import NO_LINK
from tlcore.layout.dtypes import name_of
from tlcore.protocols import Buffer
from tlcore.record import Record
from tlcore.storage import Folder, OpenFolder

from ..storage.uploads import Uploads
from .encode import Frame, frame_of
from .whole_steps import Frames

_ROW_NUMBERS = 7
# Files of one batch that are made at once: the system takes longer for a file than it takes to write it.
_THREADS = 2
# A record, and where its bytes begin and end.
_Part = tuple[Record, int, int]


class OneStep:
    """The files of a step, made in ``folder``; their names begin with ``directory``."""

    def __init__(self, folder: OpenFolder, uploads: Uploads, directory: str) -> None:
        self._folder, self._uploads, self._directory = folder, uploads, directory
        self._made: set[str] = set()
        self._links: list[tuple[str, str]] = []

    def add(self, records: Sequence[Record], meanwhile: Callable[[], object]) -> None:
        """Make these records' files; ``meanwhile`` is called while they are made.

        Raises BackendError, what ``meanwhile`` does; ValueError for bytes that are no such tensor's.
        """
        for memory, placed in _together(records):
            names = [self._within(f"{record.name}.pt") for record, _, _ in placed]
            parts = [_framed(*each) for each in placed]
            self._make_folders(names)
            for begin, end in _shares([end - begin for _, begin, end in parts]):
                self._uploads.start(partial(self._make, names[begin:end], parts[begin:end], memory))
        meanwhile()
        # What is read next finds memory that is free again.
        self._uploads.wait()

    def link(self, origin: str, name: str) -> None:
        """Have a record that was added get a second name."""
        self._links.append((self._within(f"{origin}.pt"), self._within(f"{name}.pt")))

    def finish(self, texts: Sequence[tuple[str, bytes]]) -> None:
        """Make all other files, and give the directory its name. Raises BackendError."""
        names = [self._within(name) for name, _ in texts]
        self._make_folders([*(name for _, name in self._links), *names])
        self._folder.link(self._links)
        ends = np.cumsum([len(text) for _, text in texts])
        rows = np.zeros((len(texts), _ROW_NUMBERS), np.int64)
        rows[1:, 0], rows[:, 1], rows[:, 6] = ends[:-1], ends, NO_LINK
        data = b"".join(text for _, text in texts)
        self._folder.make(Folder([], names, rows.tobytes(), data, b""))
        self._folder.publish()

    def abandon(self) -> None:
        """Forget all of it, also what is still on its way."""
        with suppress(Exception):
            self._uploads.wait()
        self._folder.abandon()

    def _make(self, names: Sequence[str], parts: Sequence[tuple[Frame, int, int]], memory: Buffer) -> None:
        frames = Frames(parts)
        rows = np.array(frames.rows, np.int64).tobytes()
        self._folder.make(Folder([], names, rows, frames.sealed(memory), memory))

    def _make_folders(self, names: Sequence[str]) -> None:
        ways = (name.split("/")[:-1] for name in names)
        needed = {"/".join(way[: depth + 1]) for way in ways for depth in range(len(way))}
        new = sorted(needed - self._made)
        if new:
            self._made.update(new)
            self._folder.make(Folder(new, [], b"", b"", b""))

    def _within(self, name: str) -> str:
        return name.removeprefix(self._directory)


def _together(records: Sequence[Record]) -> Iterator[tuple[Buffer, list[_Part]]]:
    """Records that follow each other in the same memory, with where in it the bytes of each lie."""
    for _, group in groupby(records, lambda record: id(record.data.obj)):
        found = list(group)
        whole = _memory_of(found[0].data) if len(found) > 1 else found[0].data
        base = _address(whole)
        begins = [_address(record.data) - base if record.data.nbytes else 0 for record in found]
        parts = [(each, begin, begin + each.data.nbytes) for each, begin in zip(found, begins, strict=True)]
        if all(0 <= begin <= end <= whole.nbytes for _, begin, end in parts):
            yield whole, parts
        else:
            yield from ((record.data, [(record, 0, record.data.nbytes)]) for record in found)


def _shares(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where the shares of several threads begin and end, of about as many bytes each."""
    ends = np.cumsum(sizes)
    wanted = ends[-1] * np.arange(1, _THREADS) / _THREADS
    bounds = sorted({0, *(int(each) + 1 for each in np.searchsorted(ends, wanted)), len(sizes)})
    yield from pairwise(bounds)


def _memory_of(data: memoryview) -> memoryview:
    """The memory that a view is a part of, or the view itself where that cannot be looked at as bytes."""
    try:
        return memoryview(data.obj).cast("B")
    except (TypeError, ValueError, BufferError):
        return data


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0


def _framed(record: Record, begin: int, end: int) -> tuple[Frame, int, int]:
    frame = frame_of(name_of(record.dtype), record.shape)
    if end - begin != frame.payload_bytes:
        raise ValueError(f"{record.name}: {end - begin} bytes are no {record.dtype} of shape {record.shape}")
    return frame, begin, end
