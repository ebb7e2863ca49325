"""The files of a foreign dump: what lies where, and tensors in safetensors and `torch.save` files."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tlcore.errors import BackendError, ReadError
from tlcore.layout.checks import is_shape
from tlcore.layout.dtypes import item_size
from tlcore.layout.run_files import RunFiles
from tlcore.record import Json
from tlcore.storage import Buffer, Store, SupportsFiles, SupportsLevels

from ..pt.zip_parts import END, ENTRY, LOCAL, LOCATOR, WIDE_END, ZIP64, PtError, unpack, wide
from ..safetensors.remains import DTYPES
from .pickled import LARGEST_PICKLE, Leaf, TensorAt, leaves, load

# What is read of a file at its first look; most small dumps are whole then.
_FIRST = 64 << 10
_LARGEST_HEADER = 100 << 20
_LARGEST_DIRECTORY = 64 << 20
# What an archive has between an entry's name and its bytes is less, so that one read mostly gets both.
_PADDING = 256


class DumpFiles(RunFiles):
    """The files of a dump, which lie in a directory (or are one file) that tlcore never writes into."""

    @cached_property
    def directories(self) -> list[str]:
        """The directories that lie directly in the dump."""
        return self.directories_in("")

    def directories_in(self, directory: str) -> list[str]:
        """The directories directly in one, by their full names."""
        if isinstance(self.store, SupportsLevels):
            try:
                return sorted(self.store.level(directory).directories)
            except (BackendError, OSError) as error:
                raise ReadError(str(error)) from error
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

    @cached_property
    def _in(self) -> dict[str, dict[str, int]]:
        return {}

    def _files_in(self, directory: str) -> dict[str, int]:
        if isinstance(self.store, SupportsLevels):
            try:
                return {entry.name: entry.size for entry in self.store.level(directory).blobs}
            except (BackendError, OSError) as error:
                raise ReadError(str(error)) from error
        begin = f"{directory}/"
        found = self.sizes_in(directory)
        return {name: size for name, size in found.items() if "/" not in name[len(begin) :]}


class Readable(Protocol):
    """What tensors are read from: files by name, as `RunFiles` has them."""

    url: str
    store: Any

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a file, all of it by default. Raises ReadError."""


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
    elements = np.frombuffer(view, dtype=f"V{width}") if width > 1 else np.frombuffer(view, np.uint8)
    laid = np.lib.stride_tricks.as_strided(elements, shape, [each * width for each in strides])
    return np.ascontiguousarray(laid).reshape(-1).view(np.uint8).data


def _one_piece(files: Readable, file: str, begin: int, size: int) -> Buffer:
    """The bytes of a range; of a large one of this machine in memory that is the caller's."""
    if not isinstance(files.store, SupportsFiles) or size < _FIRST:
        return _whole(files.read(file, begin, begin + size), size, file)
    try:
        with files.store.open_file(file) as opened:
            if (missing := begin + size - os.fstat(opened.fileno()).st_size) > 0:
                raise ReadError(f"{file}: ends too early, {missing} bytes are missing")
            opened.seek(begin)
            data = np.empty(size, np.uint8).data
            done = 0
            # The system reads at most 2 GiB at a time.
            while done < size and (more := opened.readinto(data[done:])):  # type: ignore[attr-defined]
                done += more
    except FileNotFoundError:
        return _whole(files.read(file, begin, begin + size), size, file)
    except (OSError, BackendError, MemoryError) as error:
        raise ReadError(f"{files.url}/{file}: {error}") from error
    if done != size:
        raise ReadError(f"{file}: ends too early, {size - done} bytes are missing")
    return data


def _span(files: Readable, file: str, begin: int, size: int) -> Any:
    """The bytes of a range; of a large one of this machine only what is looked at is read."""
    if isinstance(files.store, SupportsFiles) and size > 1 << 20:
        with files.store.open_file(file) as opened:
            return np.memmap(opened, np.uint8, "r", begin, (size,))
    return _whole(files.read(file, begin, begin + size), size, file)


def _whole(data: bytes, size: int, file: str) -> bytes:
    if len(data) != size:
        raise ReadError(f"{file}: ends too early, {size - len(data)} bytes are missing")
    return data


def safetensors_in(files: RunFiles, file: str) -> tuple[dict[str, StoredAt], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of its bytes, and its metadata.

    Raises ReadError for a file that is none.
    """
    return _once(files, file, lambda: _safetensors_in(files, file))


def _safetensors_in(files: RunFiles, file: str) -> tuple[dict[str, StoredAt], dict[str, str]]:
    where = f"{files.url}/{file}"
    head = files.read(file, 0, _FIRST)
    if len(head) < 8:
        raise ReadError(f"{where}: not a safetensors file, it is too short")
    size = struct.unpack_from("<Q", head)[0]
    if size > _LARGEST_HEADER or head[8:9] not in (b"{", b" "):
        raise ReadError(f"{where}: not a safetensors file")
    if len(head) < 8 + size:
        head = files.read(file, 0, 8 + size)
    try:
        document = json.loads(head[8 : 8 + size])
        metadata = document.pop("__metadata__", None) or {}
        found = {str(name): _described(file, 8 + size, entry) for name, entry in document.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReadError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None
    length = files.size(file)
    for name, each in found.items():
        end = each.at + prod(each.shape) * (item_size(each.dtype) or 0)
        if length is not None and end > length:
            raise ReadError(f"{where}: ends too early, {name!r} reaches beyond its end")
    ordered = dict(sorted(found.items(), key=lambda item: item[1].at))
    return ordered, {str(key): str(value) for key, value in metadata.items()}


def _described(file: str, begin: int, entry: Json) -> StoredAt:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if not is_shape(shape) or type(start) is not int or start < 0:
        raise ValueError("a shape or offset makes no sense")
    if dtype is None:
        raise ValueError(f"there is no dtype {entry['dtype']!r} here")
    if end - start != prod(shape) * (item_size(dtype) or 0):
        raise ValueError("an offset is not that of its shape")
    return StoredAt(file, begin + start, dtype, tuple(shape))


_Seen = TypeVar("_Seen")
# At most one: what a file holds refers to its store, so that an entry for each store would never go.
_looked_at: list[tuple[Store, str, Hashable, Any]] = []


def _once(files: Readable, file: str, look: Callable[[], _Seen]) -> _Seen:
    """What a file of this machine holds: the one that was recognised is opened next, and looked at once."""
    store = files.store
    identity = store.identity(file) if isinstance(store, SupportsFiles) else None
    if identity is None:
        return look()
    for whose, name, then, known in tuple(_looked_at):
        if whose is store and (name, then) == (file, identity):
            seen: _Seen = known
            return seen
    found = look()
    _looked_at[:] = [(store, file, identity, found)]
    return found


def torch_file(files: Readable, file: str, size: int) -> TorchFile:
    """A file of `torch.save`. Raises ReadError for one that is no such archive."""
    return _once(files, file, lambda: TorchFile(files, file, size))


class TorchFile:
    """A file of `torch.save`, in the archive format: its value as `pickled` has it, and where bytes lie."""

    def __init__(self, files: Readable, file: str, size: int) -> None:
        """``size`` is the file's. Raises ReadError for a file that is no such archive."""
        self._files, self._file, self._size = files, file, size
        # Small files are read once, of large ones their end.
        self._begin = max(0, size - _FIRST)
        try:
            self._tail = memoryview(files.read(file, self._begin, size))
            self._entries = self._listed()
            pickles = [name for name in self._entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise PtError("it is not an archive of torch.save")
            self._prefix = pickles[0].removesuffix("data.pkl")
            self._check_order()
            self._pickled = self._entries[pickles[0]][1]
            if self._pickled > LARGEST_PICKLE:
                raise PtError("its description is too large")
            self.value = load(self._entry(pickles[0]))
        except PtError as error:
            raise ReadError(f"{files.url}/{file}: not a .pt file that can be read ({error})") from None

    def leaves(self) -> Iterator[Leaf]:
        """What is in it that is no container, with the keys to it. Raises ReadError for too much."""
        return self._asked(leaves(self.value, self._pickled))

    def _asked(self, found: Iterator[Leaf]) -> Iterator[Leaf]:
        try:
            yield from found
        except PtError as error:
            raise ReadError(f"{self._files.url}/{self._file}: {error}") from None

    def at(self, tensor: TensorAt) -> StoredAt:
        """Where a tensor's values lie. Raises ReadError where its storage is not there or too short."""
        name = f"{self._prefix}data/{tensor.key}"
        if name not in self._entries:
            raise ReadError(f"{self._files.url}/{self._file}: the storage {tensor.key!r} is missing")
        width = item_size(tensor.dtype) or 1
        try:
            begin, size = self._place(name)
        except PtError as error:
            raise ReadError(f"{self._files.url}/{self._file}: {error}") from None
        if (tensor.offset + tensor.span) * width > size:
            raise ReadError(
                f"{self._files.url}/{self._file}: the storage {tensor.key!r} is shorter than its tensor"
            )
        strides = None if tensor.contiguous else tensor.strides
        return StoredAt(self._file, begin + tensor.offset * width, tensor.dtype, tensor.shape, strides)

    def _check_order(self) -> None:
        name = f"{self._prefix}byteorder"
        if name in self._entries and bytes(self._entry(name)) != sys.byteorder.encode():
            raise PtError("it was written on a machine with another byte order")

    def _listed(self) -> dict[str, tuple[int, int]]:
        """Each entry's offset and size."""
        view = self._directory()
        found: dict[str, tuple[int, int]] = {}
        position = 0
        while position < len(view):
            fields = unpack(ENTRY, view, position, b"PK\x01\x02")
            method, (packed, plain) = fields[4], fields[8:10]
            name_size, extra_size, comment_size, offset = *fields[10:13], fields[16]
            position += ENTRY.size
            name = bytes(view[position : position + name_size]).decode("utf-8", "replace")
            extra = view[position + name_size : position + name_size + extra_size]
            position += name_size + extra_size + comment_size
            plain, packed, offset = wide(extra, [plain, packed, offset])
            if method != 0 or plain != packed:
                raise PtError("it is compressed, which torch.save never does")
            found[name] = offset, plain
        return found

    def _directory(self) -> memoryview:
        at = self._size - END.size
        size, begin = unpack(END, self._tail, at - self._begin, b"PK\x05\x06")[5:7]
        if begin == ZIP64 or size == ZIP64:
            locator = unpack(LOCATOR, self._tail, at - 20 - self._begin, b"PK\x06\x07")
            size, begin = unpack(WIDE_END, self._bytes(locator[2], WIDE_END.size), 0, b"PK\x06\x06")[8:10]
        if size > _LARGEST_DIRECTORY or begin + size > self._size:
            raise PtError("its directory is damaged")
        return self._bytes(begin, size)

    def _place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes begin, and how many they are."""
        offset, size = self._entries[name]
        local = unpack(LOCAL, self._bytes(offset, LOCAL.size), 0, b"PK\x03\x04")
        begin = offset + LOCAL.size + local[9] + local[10]
        if begin + size > self._size:
            raise PtError("it ends too early")
        return begin, size

    def _entry(self, name: str) -> memoryview:
        offset, size = self._entries[name]
        room = LOCAL.size + len(name) + _PADDING
        block = self._bytes(offset, min(room + size, self._size - offset))
        local = unpack(LOCAL, block, 0, b"PK\x03\x04")
        begin = LOCAL.size + local[9] + local[10]
        if begin + size <= len(block):
            return block[begin : begin + size]
        return self._bytes(offset + begin, size)

    def _bytes(self, begin: int, size: int) -> memoryview:
        if begin < 0 or begin + size > self._size:
            raise PtError("it ends too early")
        if begin >= self._begin:
            return self._tail[begin - self._begin : begin - self._begin + size]
        return memoryview(self._files.read(self._file, begin, begin + size))
