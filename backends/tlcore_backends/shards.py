"""One safetensors file, written payload first: the header goes into a place kept free for it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from tlcore.errors import BackendError
from tlcore.protocols import Buffer, Store
from tlcore.record import Record

from .stores import LocalStore, UnfinishedFile

# Only what every reader of the format knows; any other dtype is stored as raw numbers and marked.
_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
# A complex number that the format lacks is two floats in a further dimension.
_COMPLEX: dict[torch.dtype, str] = {torch.complex128: "F64", torch.complex32: "F16"}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_SMALL = 1 << 20
_FIRST_RESERVE = 64 << 10
_LARGEST_RESERVE = 16 << 20
_FIXED = len('{"__metadata__":{},}') + _ALIGNMENT


class Shard:
    """The shard ``name`` while it is filled; `seal` publishes it, once.

    ``index`` counts the shards of a step: each has twice the room for its header that the one before
    had. On the local disk a payload goes straight to the unfinished file, elsewhere (and while it is
    under 1 MiB) it is gathered in memory. The bytes of a sealed shard are the same either way.
    """

    def __init__(self, store: Store, name: str, index: int) -> None:
        self.name = name
        self.payload_bytes = 0
        self._store = store
        self._reserve = min(_FIRST_RESERVE << min(index, 16), _LARGEST_RESERVE)
        self._gathered: list[bytes] = []
        self._file: UnfinishedFile | None = None
        self._metadata = ['"format":"pt"', '"tlcore.layout":"1"']
        self._tensors: list[str] = []
        self._header_bytes = _FIXED + sum(map(len, self._metadata))
        self._data_begin: int | None = None

    def has_room(self, record: Record, shard_bytes: int) -> bool:
        """Whether ``record`` (an alias or not) may still go into this shard; an empty one takes any."""
        header = self._header_bytes + sum(len(text) + 1 for text in _described(record, self.payload_bytes))
        payload = 0 if record.alias_of else record.nbytes
        fits = not self.payload_bytes or self.payload_bytes + payload <= shard_bytes
        return fits and header <= self._reserve - _LENGTH_BYTES

    def add(self, record: Record) -> tuple[int, int]:
        """Take over a record's bytes; returns where they begin and end in the payload."""
        begin = self.payload_bytes
        entry, *marks = _described(record, begin)
        self._keep(record.data)
        self._tensors.append(entry)
        self._metadata += marks
        self._header_bytes += sum(len(text) + 1 for text in (entry, *marks))
        self.payload_bytes += record.nbytes
        return begin, self.payload_bytes

    def add_alias(self, record: Record) -> None:
        """Note in the shard's metadata that a name stands for an earlier tensor of the step."""
        (mark,) = _described(record, 0)
        self._metadata.append(mark)
        self._header_bytes += len(mark) + 1

    def seal(self) -> int:
        """Publish the shard; returns its size in bytes."""
        head = self._head()
        self._data_begin = len(head)
        if self._file is None:
            return self._store.put(self.name, [head, *self._gathered])
        try:
            self._file.publish(head)
        except OSError as error:
            self.abandon()
            raise _refused(self._file, error) from error
        return len(head) + self.payload_bytes

    def abandon(self) -> None:
        """Forget an unsealed shard and its file."""
        self._gathered = []
        if self._file is not None:
            self._file.abandon()

    @property
    def data_begin(self) -> int:
        """Where the payload begins in the sealed file."""
        if self._data_begin is None:
            raise ValueError(f"{self.name} is not sealed")
        return self._data_begin

    def _keep(self, data: memoryview) -> None:
        if self._file is not None:
            self._append(self._file, [data])
            return
        streams = isinstance(self._store, LocalStore) and self.payload_bytes + data.nbytes > _SMALL
        if not streams or not isinstance(self._store, LocalStore):
            self._gathered.append(bytes(data))
            return
        self._file = self._store.begin(self.name, self._reserve)
        self._append(self._file, [*self._gathered, data])
        self._gathered = []

    def _append(self, file: UnfinishedFile, parts: Sequence[Buffer]) -> None:
        try:
            file.write(parts)
        except OSError as error:
            file.abandon()
            raise _refused(file, error) from error

    def _head(self) -> bytes:
        metadata = '"__metadata__":{' + ",".join(self._metadata) + "}"
        text = ("{" + ",".join([metadata, *self._tensors]) + "}").encode("ascii")
        if self.payload_bytes > _SMALL:
            length = self._reserve - _LENGTH_BYTES
        else:
            length = len(text) + -len(text) % _ALIGNMENT
        return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _described(record: Record, begin: int) -> list[str]:
    """The header's text for a record: its entry and, if needed, its dtype's mark; or an alias's mark."""
    if record.alias_of is not None:
        return [_pair(f"tlcore.alias.{record.name}", record.alias_of)]
    dtype, shape = _DTYPES.get(record.dtype), list(record.shape)
    marks = []
    if dtype is None:
        marks = [_pair(f"tlcore.dtype.{record.name}", str(record.dtype).removeprefix("torch."))]
        dtype = _COMPLEX.get(record.dtype, "U8")
        shape.append(2 if record.dtype in _COMPLEX else record.dtype.itemsize)
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + record.nbytes]}
    return [_pair(record.name, entry), *marks]


def _pair(key: str, value: object) -> str:
    return f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}"


def _refused(file: UnfinishedFile, error: OSError) -> BackendError:
    return BackendError(f"cannot write {file.target}: {error.strerror or error}")
