"""The values of a stored tensor, read a piece at a time, so that a tensor need not fit in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Protocol

from ..errors import ReadError
from ..layout.dtypes import torch_dtype
from ..layout.row_scale import SCALE_BYTES, as_stored, is_scaled, restored
from ..layout.run_files import BlockStream
from ..protocols import Buffer, ByteStream
from ..record import Json, tensor_from_bytes
from .stored import Stored
from .tensor_bytes import kind

if TYPE_CHECKING:
    import torch


# A tensor of up to this many bytes is rather held than read piece by piece.
SMALL = 1 << 20


class TensorStream(Protocol):
    """The flat values of a tensor, in C order."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> torch.Tensor:
        """The values ``[begin, end)``, valid until the next call. Raises ReadError when they are missing."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def in_memory(tensor: torch.Tensor) -> TensorStream:
    """The values of a tensor that is there already."""
    return _Whole(tensor)


def is_in_memory(stream: TensorStream) -> bool:
    """Whether reading it costs nothing, and cannot fail."""
    return isinstance(stream, _Whole)


def open_together(stored: Stored, records: Sequence[Json]) -> list[TensorStream | ReadError]:
    """The values of several records, or why they cannot be had; small ones are read at once, together."""
    records = list(map(as_stored, records))
    # What is not as its document says is opened alone, and told as ever.
    small = [record["bytes"] <= SMALL and stored.holds(record) for record in records]
    data = iter(stored.read_many(list(itertools.compress(records, small))) if any(small) else ())
    found: list[TensorStream | ReadError] = []
    for record, together in zip(records, small, strict=True):
        try:
            found.append(_held(stored, record, next(data)) if together else open_stream(stored, record))
        except ReadError as error:
            found.append(error)
    return found


def _held(stored: Stored, record: Json, data: Buffer | ReadError) -> TensorStream:
    if isinstance(data, ReadError):
        raise data
    dtype, shape = kind(record, f"{stored.url}: {record['name']!r}")
    found = tensor_from_bytes(bytearray(data), dtype, shape)
    return _Whole(restored(found, record["converted_from"]) if is_scaled(record) else found)


def open_stream(stored: Stored, record: Json) -> TensorStream:
    """The values of a record. Raises ReadError when it is missing, of another size, or makes no sense."""
    record = as_stored(record)
    where = f"{stored.url}: {record.get('name')!r}"
    dtype, shape = kind(record, where)
    size = prod(shape) * dtype.itemsize
    found = stored.stream(record)
    if found is None:
        found = BlockStream(lambda begin, end: stored.read_range(record, begin, end), size)
    stream = _Stream(found, dtype, shape, where)
    return _Restored(stream, str(record["converted_from"])) if is_scaled(record) else stream


class _Stream:
    def __init__(self, source: ByteStream, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> None:
        self.dtype, self.shape = dtype, shape
        self._source, self._where = source, where
        self._buffer = bytearray()

    def read(self, begin: int, end: int) -> torch.Tensor:
        import torch

        width = self.dtype.itemsize
        count = (end - begin) * width
        if not 0 <= begin <= end <= prod(self.shape):
            raise ValueError(f"values {begin} to {end} of {prod(self.shape)}")
        if count == 0:
            return torch.empty(0, dtype=self.dtype)
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        found = self._source.readinto(begin * width, memoryview(self._buffer)[:count])
        if found < count:
            raise ReadError(f"{self._where}: ends too early, {found} bytes of {count} at {begin * width}")
        return torch.frombuffer(self._buffer, dtype=self.dtype, count=end - begin)

    def close(self) -> None:
        self._source.close()


class _Restored:
    """The values of rows with a scale, of whole rows at a time."""

    def __init__(self, packed: TensorStream, name: str) -> None:
        dtype = torch_dtype(name)
        assert dtype is not None
        *outer, self._stored_width = packed.shape
        self._width = self._stored_width - SCALE_BYTES
        self.dtype, self.shape = dtype, (*outer, self._width)
        self._packed, self._name = packed, name

    def read(self, begin: int, end: int) -> torch.Tensor:
        if begin == end:
            return restored(self._packed.read(0, 0).view(0, self._stored_width), self._name).view(-1)
        first, last = begin // self._width, -(-end // self._width)
        rows = self._packed.read(first * self._stored_width, last * self._stored_width)
        values = restored(rows.view(-1, self._stored_width), self._name).view(-1)
        return values[begin - first * self._width : end - first * self._width]

    def close(self) -> None:
        self._packed.close()


class _Whole:
    """A tensor that had to be loaded as a whole."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self._flat = tensor.detach().reshape(-1)

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._flat[begin:end]

    def close(self) -> None:
        self._flat = self._flat[:0]
