"""One safetensors file, written payload first: the header goes into a place kept free for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from tlcore.errors import BackendError
from tlcore.layout.dtypes import name_of
from tlcore.layout.templates import compact, quoted
from tlcore.record import Record
from tlcore.storage import Appending, Buffer, Store, SupportsAppend

from .data_file import DataFile
from .shard_buffer import ShardBuffer, ShardBuffers

if TYPE_CHECKING:
    import torch

# Only what every reader of the format knows; any other dtype is stored as raw numbers and marked.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
# A complex number that the format lacks is two floats in a further dimension.
_COMPLEX = {"complex128": "F64", "complex32": "F16"}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_SMALL = 1 << 20
_FIRST_RESERVE = 64 << 10
_LARGEST_RESERVE = 16 << 20
_RESERVED_SHARE = 16
_FIXED = len('{"__metadata__":{},}') + _ALIGNMENT


class Shard:
    """The shard ``name`` while it is filled; `seal` publishes it, once.

    It is full at ``shard_bytes``, or when its header is. ``index`` counts the shards of a step: each has
    twice the room for its header that the one before had, up to a part of ``shard_bytes``. On the local
    disk a payload goes straight to the unfinished file, elsewhere (and while it is under 1 MiB) it is
    gathered in ``memory``. The bytes of a sealed shard are the same either way.
    """

    def __init__(self, store: Store, name: str, index: int, shard_bytes: int, memory: ShardBuffers) -> None:
        self.name = name
        self.quoted_name = quoted(name)
        self.payload_bytes = 0
        self._store = store
        self._shard_bytes = shard_bytes
        largest = min(max(shard_bytes // _RESERVED_SHARE, _FIRST_RESERVE), _LARGEST_RESERVE)
        self._reserve = min(_FIRST_RESERVE << min(index, 16), largest)
        self._waiting: list[memoryview] = []
        self._memory = memory
        # Room for the header, then the payload: nothing need be put together when it is published.
        self._gathered: ShardBuffer | None = None
        self._file: Appending | None = None
        self._metadata = ['"format":"pt"', '"tlcore.layout":"1"']
        self._tensors: list[str] = []
        self._header_bytes = _FIXED + sum(map(len, self._metadata))
        self._empty = True
        self._data_begin: int | None = None

    def add(self, record: Record) -> int | None:
        """Take over a record; returns where its bytes begin in the payload, None when there is no room.

        An empty shard takes any record. The bytes are only noted: call `flush` before they change.
        """
        begin = self.payload_bytes
        end = begin + record.data.nbytes
        fragment, dtype = header_of(record.origin.dtype, record.origin.shape)
        entry = f"{quoted(record.name)}:{fragment}[{begin},{end}]}}"
        header = self._header_bytes + len(entry) + 1
        if dtype:
            mark = f"{quoted(f'tlcore.dtype.{record.name}')}:{dtype}"
            header += len(mark) + 1
        if (begin and end > self._shard_bytes) or self._is_full(header):
            return None
        self._empty = False
        if dtype:
            self._metadata.append(mark)
        self._tensors.append(entry)
        self._header_bytes = header
        self.payload_bytes = end
        self._waiting.append(record.data)
        return begin

    def add_alias(self, record: Record) -> bool:
        """Note in the shard's metadata that a name stands for an earlier tensor; False without room."""
        mark = f"{quoted(f'tlcore.alias.{record.name}')}:{quoted(record.alias_of or '')}"
        header = self._header_bytes + len(mark) + 1
        if self._is_full(header):
            return False
        self._empty = False
        self._metadata.append(mark)
        self._header_bytes = header
        return True

    def _is_full(self, header_bytes: int) -> bool:
        # Tensors without elements and further names fill a header too, beside no payload at all.
        return not self._empty and header_bytes > self._reserve - _LENGTH_BYTES

    def flush(self) -> None:
        """Write or copy the bytes of all records added so far."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        if self._file is None:
            if not isinstance(self._store, SupportsAppend) or self.payload_bytes <= _SMALL:
                self._gather(waiting)
                return
            self._file = self._store.begin(self.name, self._reserve)
            if self._gathered is not None:
                with self._gathered.view() as whole, whole[self._reserve :] as payload:
                    self._append(self._file, [payload])
                self._memory.give(self._gathered)
                self._gathered = None
        self._append(self._file, waiting)

    def _gather(self, parts: Sequence[memoryview]) -> None:
        if self._gathered is None:
            self._gathered = self._memory.take()
            self._gathered.skip(self._reserve)
        for part in parts:
            self._gathered.append(part)

    def seal(self, run: Callable[[Callable[[], None]], None]) -> DataFile:
        """Publish the shard. One gathered in memory is sent by ``run``."""
        self.flush()
        head = self._head()
        self._data_begin = len(head)
        sealed = DataFile.of(self.name, len(head) + self.payload_bytes, head)
        if self._file is None:
            run(lambda: self._send(head))
            return sealed
        try:
            self._file.publish(head)
        except OSError as error:
            self.abandon()
            raise _refused(self._file, error) from error
        return sealed

    def _send(self, head: bytes) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            self._store.put(self.name, [head])
            return
        self._store.put(self.name, self._whole(gathered, head))
        self._memory.give(gathered)

    def _whole(self, gathered: ShardBuffer, head: bytes) -> Sequence[Buffer]:
        whole = gathered.view()
        if self.payload_bytes <= _SMALL:
            return [head, whole[self._reserve :]]
        whole[: self._reserve] = head
        return [whole]

    def abandon(self) -> None:
        """Forget an unsealed shard and its file."""
        self._gathered, self._waiting = None, []
        if self._file is not None:
            self._file.abandon()

    @property
    def data_begin(self) -> int:
        """Where the payload begins in the sealed file."""
        if self._data_begin is None:
            raise ValueError(f"{self.name} is not sealed")
        return self._data_begin

    def _append(self, file: Appending, parts: Sequence[Buffer]) -> None:
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
        if len(text) > length:
            raise BackendError(f"{self.name}: {len(text)} bytes of header do not fit into {length}")
        return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


@lru_cache(maxsize=4096)
@lru_cache(maxsize=1024)
def header_of(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, str]:
    """A header entry up to its offsets; and, where the format lacks the dtype, the dtype's name as JSON."""
    own = name_of(dtype)
    name, extents, mark = _DTYPES.get(own), list(shape), ""
    if name is None:
        mark = quoted(own)
        name = _COMPLEX.get(own, "U8")
        extents.append(2 if own in _COMPLEX else dtype.itemsize)
    return f'{{"dtype":"{name}","shape":{compact(extents)},"data_offsets":', mark


def _refused(file: Appending, error: OSError) -> BackendError:
    return BackendError(f"cannot write {file.target}: {error.strerror or error}")
