"""The values of a stored tensor, read a piece at a time, so that a tensor need not fit in memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any, Protocol

import torch

from ..errors import ReadError
from ..record import Json
from .files import RunFiles
from .slices import Slice

# One request to a store that is not a local disk.
_BLOCK_BYTES = 8 << 20
_PT_HEAD = ("tlcore_backends.pt.encode", "head")


class Payload(Protocol):
    """The flat values of a tensor, in C order."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> torch.Tensor:
        """The values ``[begin, end)``, valid until the next call. Raises ReadError when they are missing."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def in_memory(tensor: torch.Tensor) -> Payload:
    """The values of a tensor that is there already."""
    return _Whole(tensor)


def open_payload(files: RunFiles, record: Json, size: int | None) -> Payload:
    """The values of a record of ``step.json``; ``size`` is what its file or shard must have in bytes.

    Raises ReadError when it is missing, of another size, or makes no sense.
    """
    where = f"{files.url}: {record.get('name')!r}"
    file = record.get("file")
    name = file if isinstance(file, str) else Slice.of(record, where).shard
    found = files.size(name)
    if found is not None and size is not None and found != size:
        raise ReadError(f"{files.url}/{name}: {found} bytes, step.json says {size}")
    source = _Local.open(files, name) or _Blocks(files, name, found or 0)
    if file is None:
        place = Slice.of(record, where)
        return _Stream(source, place.begin, place.dtype, place.shape)
    head = _pt_head(record)
    with suppress(ReadError):
        if head is not None and source.take(0, len(head)) == head:
            return _Stream(source, len(head), *_kind(record))
    source.close()
    # Not as our own backend writes it, so it takes the library to read it.
    return _Whole(files.stored(record))


def _kind(record: Json) -> tuple[torch.dtype, tuple[int, ...]]:
    return getattr(torch, str(record["dtype"])), tuple(record["shape"])


def _pt_head(record: Json) -> bytes | None:
    """What a ``.pt`` file of this dtype and shape begins with; its payload follows.

    Raises ReadError for a record whose size is not that of its shape.
    """
    dtype = getattr(torch, str(record.get("dtype")), None)
    shape: Any = record.get("shape")
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, list):
        return None
    if prod(shape) * dtype.itemsize != record.get("bytes"):
        raise ReadError(
            f"{record.get('name')!r}: {record.get('bytes')} bytes are no {dtype} of shape {shape}"
        )
    module, function = _PT_HEAD
    # Looked up by name, since the engine never imports a backend.
    head: Callable[..., bytes] = getattr(importlib.import_module(module), function)
    return head(dtype, tuple(shape))


class _Bytes(Protocol):
    def into(self, offset: int, target: memoryview) -> int: ...
    def take(self, offset: int, count: int) -> bytes: ...
    def close(self) -> None: ...


class _Local:
    """A file of this machine."""

    def __init__(self, file: Any) -> None:
        self._file = file

    @classmethod
    def open(cls, files: RunFiles, name: str) -> _Local | None:
        """The file, or None where the run's store only serves ranges."""
        file = files.open(name)
        return None if file is None else cls(file)

    def into(self, offset: int, target: memoryview) -> int:
        self._file.seek(offset)
        count: int = self._file.readinto(target)
        return count

    def take(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        data: bytes = self._file.read(count)
        return data

    def close(self) -> None:
        self._file.close()


class _Blocks:
    """A file that is read in blocks of a few megabytes, the last of which is kept."""

    def __init__(self, files: RunFiles, name: str, size: int) -> None:
        self._files, self._name, self._size = files, name, size
        self._begin, self._block = 0, memoryview(b"")

    def into(self, offset: int, target: memoryview) -> int:
        done = 0
        while done < len(target):
            part = self._at(offset + done, len(target) - done)
            if not part:
                break
            target[done : done + len(part)] = part
            done += len(part)
        return done

    def take(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        return bytes(data[: self.into(offset, memoryview(data))])

    def close(self) -> None:
        self._block = memoryview(b"")

    def _at(self, offset: int, most: int) -> memoryview:
        within = offset - self._begin
        if not 0 <= within < len(self._block):
            end = offset + max(_BLOCK_BYTES, most)
            self._block = memoryview(self._files.read(self._name, offset, min(end, self._size or end)))
            self._begin, within = offset, 0
        return self._block[within : within + most]


class _Stream:
    """A payload that lies in one piece in a file, from ``offset`` on."""

    def __init__(self, source: _Bytes, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self._source, self._offset = source, offset
        self._buffer = bytearray()

    def read(self, begin: int, end: int) -> torch.Tensor:
        width = self.dtype.itemsize
        count = (end - begin) * width
        if not 0 <= begin <= end <= prod(self.shape):
            raise ValueError(f"values {begin} to {end} of {prod(self.shape)}")
        if count == 0:
            return torch.empty(0, dtype=self.dtype)
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        try:
            found = self._source.into(self._offset + begin * width, memoryview(self._buffer)[:count])
        except OSError as error:
            raise ReadError(str(error)) from error
        if found < count:
            raise ReadError(f"a file ends too early: {found} bytes of {count} at {self._offset}")
        return torch.frombuffer(self._buffer, dtype=self.dtype, count=end - begin)

    def close(self) -> None:
        self._source.close()


class _Whole:
    """A tensor that had to be loaded as a whole."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self._flat = tensor.detach().reshape(-1)

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._flat[begin:end]

    def close(self) -> None:
        self._flat = self._flat[:0]
