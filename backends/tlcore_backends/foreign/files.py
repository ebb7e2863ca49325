"""The files of a foreign dump: what lies where, and the values of tensors in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from functools import cached_property
from math import prod
from mmap import ACCESS_READ, mmap
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

from tlcore.errors import BackendError, ReadError
from tlcore.hotpath.reading import read_files
from tlcore.layout.dtypes import item_size
from tlcore.layout.run_files import RunFiles, parse
from tlcore.record import Json
from tlcore.storage import Buffer, Level, Store, SupportsLevels

# What is read of a file at its first look; most small dumps are whole then.
FIRST, _FIRST_HERE = 64 << 10, 4 << 10
_LEAST_OWN = 16 << 10


class Handle:
    """An open file, until nobody has this any more: a thread may read while another opens the next one."""

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        self.number = opened.fileno()
        self._map = memoryview(b"")

    def mapped(self) -> memoryview:
        """All of the file as it is now: of parts that lie here and there, only those are read."""
        size = os.fstat(self.number).st_size
        if len(self._map) != size:
            self._map = memoryview(mmap(self.number, size, access=ACCESS_READ) if size else b"")
        return self._map

    def __del__(self) -> None:
        self._opened.close()


class DumpFiles(RunFiles):
    """The files of a dump, which lie in a directory (or are one file) that tlcore never writes into."""

    @classmethod
    def of(cls, store: Store) -> DumpFiles:
        """The files of a store; those by which it was just recognised are not listed again."""
        with suppress(IndexError):
            if (files := _handed_over.pop()).store is store:
                return files
        return cls(store)

    def hand_over(self) -> None:
        """Leave these files, with what is known of them, to whoever asks for those of the store next."""
        self.close()
        _handed_over[:] = [self]

    @cached_property
    def directories(self) -> list[str]:
        """The directories that lie directly in the dump."""
        return self.directories_in("")

    @cached_property
    def top(self) -> Mapping[str, int]:
        """The files that lie directly in the dump, and their sizes, as they were at first use."""
        return self._files_in("") if isinstance(self.store, SupportsLevels) else super().top

    def directories_in(self, directory: str) -> list[str]:
        """The directories directly in one, by their full names."""
        if isinstance(self.store, SupportsLevels):
            return sorted(self._level(self.store, directory).directories)
        begin = f"{directory}/" if directory else ""
        below = (name[len(begin) :] for name in self.sizes if name.startswith(begin))
        return sorted({begin + name.partition("/")[0] for name in below if "/" in name})

    def files_in(self, directory: str) -> Mapping[str, int]:
        """The files directly in a directory by their full names, and sizes, as they were at first use."""
        if not directory:
            return self.top
        if directory not in self._in:
            self._in[directory] = self._files_in(directory)
        return self._in[directory]

    def json(self, name: str) -> Any:
        """The value of a tool's JSON file, in which NaN and Infinity are numbers, as Python writes them.

        Raises MissingError, or ReadError when it is no JSON.
        """
        return parse(self.json_bytes(name), f"{self.url}/{name}", all_numbers=True)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, as `RunFiles` reads them."""
        if (handle := self.handle(name)) is None:
            return super().read(name, start, end)
        try:
            size = os.fstat(handle.number).st_size
            count = max(0, min(size, size if end is None else end) - start)
            # The system reads at most 2 GiB at a time.
            return super().read(name, start, end) if count >> 30 else os.pread(handle.number, count, start)
        except OSError as error:
            raise ReadError(f"{self.url}/{name}: {error}") from error
        except MemoryError:
            raise ReadError(f"{self.url}/{name}: larger than this machine's memory") from None

    def whole(self, name: str, most: int) -> memoryview | None:
        """All of a file of this machine, in the caller's own memory; None for others and larger ones."""
        if self._local is None:
            return None
        size = self.size(name) if "/" in name else self.top.get(name)
        if size is not None and size <= most:
            data = np.empty(size, np.uint8).data
            if read_files(data, self._local.path(), (name,), (size,)) == [0]:
                return data
        # A link, or another file than was listed.
        opened = self.open(name)
        if opened is None:
            return None
        try:
            with opened:
                size = os.fstat(opened.fileno()).st_size
                if size > most:
                    return None
                data = np.empty(size, np.uint8).data
                return data[: os.readv(opened.fileno(), (data,)) if size else 0]
        except OSError as error:
            raise ReadError(f"{self.url}/{name}: {error}") from error

    def identity(self, name: str) -> Hashable | None:
        """What the file that is open is, as `RunFiles` tells it of one by its name."""
        try:
            if (handle := self.handle(name)) is None:
                return None
            state = os.fstat(handle.number)
        except (ReadError, OSError):
            return None
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    @property
    def first(self) -> int:
        """How much of a file is read at the first look: another one costs more where it is not here."""
        return _FIRST_HERE if self.is_local else FIRST

    def handle(self, name: str) -> Handle | None:
        """A file of this machine, open for reading by places; None for others. The last one stays open."""
        held = self._held
        if held is None or held[0] != name:
            opened = self.open(name)
            held = self._held = None if opened is None else (name, Handle(opened))
        return None if held is None else held[1]

    @cached_property
    def _held(self) -> tuple[str, Handle] | None:
        return None

    def close(self) -> None:
        """Keep nothing open."""
        self._held = None

    @cached_property
    def _in(self) -> dict[str, dict[str, int]]:
        return {}

    def _level(self, store: SupportsLevels, directory: str) -> Level:
        """What lies directly in a directory; that of the dump itself is asked for twice."""
        if not directory and self._own_level is not None:
            return self._own_level
        try:
            found = store.level(directory)
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        if not directory:
            self._own_level = found
        return found

    @cached_property
    def _own_level(self) -> Level | None:
        return None

    def _files_in(self, directory: str) -> dict[str, int]:
        if isinstance(self.store, SupportsLevels):
            return {entry.name: entry.size for entry in self._level(self.store, directory).blobs}
        begin = f"{directory}/"
        found = self.sizes_in(directory)
        return {name: size for name, size in found.items() if "/" not in name[len(begin) :]}


class Readable(Protocol):
    """What tensors are read from: files by name, as `RunFiles` has them."""

    url: str
    store: Any

    @property
    def first(self) -> int:
        """How many bytes of a file are read at the first look."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default. Raises ReadError."""

    def open(self, name: str) -> BinaryIO | None:
        """The file where it is one of this machine, unbuffered. Raises ReadError."""

    def handle(self, name: str) -> Handle | None:
        """The same as a handle that stays open until another one is asked for. Raises ReadError."""

    def identity(self, name: str) -> Hashable | None:
        """What is the same for a file of this machine as long as nobody writes into it."""


class StoredAt(NamedTuple):
    """Where a tensor's values lie in a file: from byte ``at`` on, in elements' ``strides`` if given."""

    file: str
    at: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def place(self) -> Json:
        """The same in a record."""
        found: Json = {"file": self.file, "at": self.at}
        return found if self.strides is None else {**found, "strides": list(self.strides)}


def shown_path(files: Readable, file: str) -> str:
    """A file's path or URL; one that was opened alone has no other name below it."""
    return files.url if files.url.endswith(f"/{file}") else f"{files.url}/{file}"


def read_at(files: Readable, record: Mapping[str, Any]) -> Buffer:
    """The values of a record whose place is a `StoredAt`. Raises ReadError where the file is too short."""
    place, shape = record["place"], tuple(record["shape"])
    begin = int(place["at"])
    strides = place.get("strides")
    if strides is None:
        return _one_piece(files, str(place["file"]), begin, int(record["bytes"]))
    if prod(shape) == 0:
        return b""
    width = item_size(record["dtype"]) or 1
    span = (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) * width
    view = _span(files, str(place["file"]), begin, span)
    if strides[-1] == 1 and shape[-1]:
        # Rows are copied each at once.
        shape, strides, piece = shape[:-1], strides[:-1], width * shape[-1]
    else:
        piece = width
    laid: Any = np.ndarray(shape, f"V{piece}", view, 0, [each * width for each in strides])
    return np.ascontiguousarray(laid).reshape(-1).view(np.uint8).data


def _one_piece(files: Readable, file: str, begin: int, size: int) -> Buffer:
    """The bytes of a range; of a large one of this machine in memory that is the caller's."""
    handle = files.handle(file) if size >= _LEAST_OWN else None
    if handle is None:
        return _whole(files.read(file, begin, begin + size), size, shown_path(files, file))
    try:
        if (missing := begin + size - os.fstat(handle.number).st_size) > 0:
            raise ReadError(f"{shown_path(files, file)}: ends too early, {missing} bytes are missing")
        data = np.empty(size, np.uint8).data
        done = os.preadv(handle.number, (data,), begin)
        # The system reads at most 2 GiB at a time.
        while done < size and (more := os.preadv(handle.number, (data[done:],), begin + done)):
            done += more
    except (OSError, MemoryError) as error:
        raise ReadError(f"{shown_path(files, file)}: {error}") from error
    if done != size:
        raise ReadError(f"{shown_path(files, file)}: ends too early, {size - done} bytes are missing")
    return data


def _span(files: Readable, file: str, begin: int, size: int) -> Any:
    """The bytes of a range; of a large one of this machine only what is looked at is read."""
    if (handle := files.handle(file)) is None:
        return _whole(files.read(file, begin, begin + size), size, shown_path(files, file))
    try:
        return _whole(handle.mapped()[begin : begin + size], size, shown_path(files, file))
    except OSError as error:
        raise ReadError(f"{shown_path(files, file)}: {error}") from error


def _whole(data: _Bytes, size: int, where: str) -> _Bytes:
    if len(data) != size:
        raise ReadError(f"{where}: ends too early, {size - len(data)} bytes are missing")
    return data


# At most one.
_handed_over: list[DumpFiles] = []
_Seen = TypeVar("_Seen")
_Bytes = TypeVar("_Bytes", bytes, memoryview)
# At most one: what a file holds refers to its store, so that an entry for each store would never go.
_looked_at: list[tuple[Store, str, Hashable, Any]] = []


def once(files: Readable, file: str, look: Callable[[], _Seen]) -> _Seen:
    """What a file of this machine holds: the one that was recognised is opened next, and looked at once."""
    store, identity = files.store, files.identity(file)
    if identity is None:
        return look()
    for whose, name, then, known in tuple(_looked_at):
        if whose is store and (name, then) == (file, identity):
            seen: _Seen = known
            return seen
    found = look()
    _looked_at[:] = [(store, file, identity, found)]
    return found
