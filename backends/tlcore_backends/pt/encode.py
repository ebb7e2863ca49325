"""The bytes of a ``.pt`` file, made around a payload without copying it.

The result is what ``torch.save(tensor, buffer)`` writes: a zip archive of stored entries whose payload
starts at a multiple of 64 bytes. All of it but the checksum of the payload depends on dtype and shape
alone, so the bytes before and after the payload are built once and then only patched.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tlcore.hotpath.seals import Seal, mix
from tlcore.layout.dtypes import item_size, name_of
from tlcore.protocols import Buffer

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
_PREFIX = "archive/"
_ID_ENTRY = ".data/serialization_id"
# The first half of torch's serialization id is a hash of the entries' names, which never differ here.
_ID_NAMES = "15728199511854643026"
_ID_BYTES = 40
_UTF8_FLAG, _DESCRIPTOR_FLAG = 0x0800, 0x0008
_ZIP64_LIMIT = 0xFFFFFFFF
# Dtypes that have a storage class of their own in torch, with its name.
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}


def encode(dtype: torch.dtype | str, shape: Sequence[int], data: memoryview) -> list[Buffer]:
    """The buffers of a ``.pt`` file holding ``data``: what precedes it, ``data`` itself, what follows.

    ``data`` is the C-contiguous little-endian payload of a tensor of ``dtype`` and ``shape``. Raises
    ValueError when the sizes disagree.
    """
    frame = _frame(name_of(dtype), tuple(shape))
    if data.nbytes != frame.payload_bytes:
        raise ValueError(f"{data.nbytes} bytes do not make a {dtype} tensor of shape {tuple(shape)}")
    return [frame.head, data, frame.tail(zlib.crc32(data))]


def file_bytes(dtype: torch.dtype | str, shape: Sequence[int]) -> int:
    """The size in bytes of the ``.pt`` file of a tensor of ``dtype`` and ``shape``."""
    frame = _frame(name_of(dtype), tuple(shape))
    return frame.size


def payload_in(dtype: torch.dtype | str, shape: Sequence[int], data: bytes | memoryview) -> memoryview | None:
    """The payload in a file that is, around it, exactly what `encode` writes; None for any other file.

    Whether the checksums belong to the payload is left to whoever knows its hash.
    """
    frame = _frame(name_of(dtype), tuple(shape))
    begin = len(frame.head)
    end = begin + frame.payload_bytes
    tail = data[end:]
    if len(tail) != len(frame.after) or data[:begin] != frame.head:
        return None
    checksum = struct.unpack_from("<I", tail, frame.payload_checksum_at[0])[0] if frame.payload_bytes else 0
    return memoryview(data)[begin:end] if frame.tail(checksum) == tail else None


def frame_of(dtype: str, shape: Sequence[int]) -> Frame:
    """What is around the payload in the ``.pt`` file of a tensor. Raises ValueError."""
    return _frame(dtype, tuple(shape))


def head(dtype: torch.dtype | str, shape: Sequence[int]) -> bytes:
    """What precedes the payload in a ``.pt`` file of this dtype and shape."""
    return _frame(name_of(dtype), tuple(shape)).head


@dataclass(frozen=True, slots=True)
class Frame:
    """A ``.pt`` file of one dtype and shape without its payload; ``after`` still lacks four checksums.

    ``size`` is that of the whole file. ``text`` is all but the payload, and ``seal`` says what it lacks.
    """

    payload_bytes: int
    head: bytes
    after: bytes
    folded: int
    payload_checksum_at: tuple[int, ...]
    id_at: int
    id_checksum_at: tuple[int, ...]
    size: int
    text: bytes
    seal: Seal

    def tail(self, checksum: int) -> bytes:
        """What follows a payload whose CRC-32 is ``checksum``."""
        folded = mix(self.folded, checksum) if self.payload_bytes else self.folded
        identity = f"{_ID_NAMES}{mix(folded, zlib.crc32(_VERSION[1])):020d}".encode()
        tail = bytearray(self.after)
        tail[self.id_at : self.id_at + len(identity)] = identity
        identity_checksum = zlib.crc32(identity)
        for position in self.payload_checksum_at:
            struct.pack_into("<I", tail, position, checksum)
        for position in self.id_checksum_at:
            struct.pack_into("<I", tail, position, identity_checksum)
        return bytes(tail)


_VERSION = ("version", b"3\n")


@lru_cache(maxsize=1024)
def _frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    before_payload = [
        ("data.pkl", _pickled_tensor(dtype, shape)),
        (".format_version", b"1"),
        (".storage_alignment", str(_ALIGNMENT).encode()),
        ("byteorder", sys.byteorder.encode()),
    ]
    payload_bytes = _count(shape) * _width(dtype)
    archive, folded = _Archive(), 0
    for name, content in before_payload:
        archive.add(name, content)
        folded = mix(folded, zlib.crc32(content))
    head_bytes = archive.add_elsewhere("data/0", payload_bytes)
    archive.add(*_VERSION)
    id_at = archive.add(_ID_ENTRY, bytes(_ID_BYTES))
    archive.finish()
    names = _ID_NAMES.encode()
    text = bytearray(archive.content)
    text[id_at : id_at + len(names)] = names
    checksums = archive.checksums_at
    seal = Seal(
        of_data=tuple(checksums["data/0"]),
        mixed=folded,
        last=zlib.crc32(_VERSION[1]),
        digits=id_at + len(names),
        begin=id_at,
        end=id_at + _ID_BYTES,
        of_range=tuple(checksums[_ID_ENTRY]),
    )
    return Frame(
        payload_bytes=payload_bytes,
        head=bytes(archive.content[:head_bytes]),
        after=bytes(archive.content[head_bytes:]),
        folded=folded,
        payload_checksum_at=tuple(at - head_bytes for at in archive.checksums_at["data/0"]),
        id_at=id_at - head_bytes,
        id_checksum_at=tuple(at - head_bytes for at in archive.checksums_at[_ID_ENTRY]),
        size=payload_bytes + len(archive.content),
        text=bytes(text),
        seal=seal,
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One archive entry as the central directory lists it."""

    name: bytes
    size: int
    offset: int
    flags: int
    checksum: int

    def zip64_field(self, stored_size: int) -> bytes:
        """The extra field that carries what does not fit in 32 bits; empty when all fits.

        ``stored_size`` is 0 in the header before the content, where torch does not know it yet.
        """
        values = []
        if self.size >= _ZIP64_LIMIT:
            values += [self.size, stored_size]
        if self.offset >= _ZIP64_LIMIT:
            values.append(self.offset)
        return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


class _Archive:
    """Builds a zip archive of stored, aligned entries, one of whose contents lies elsewhere."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.checksums_at: dict[str, list[int]] = {}
        self._elsewhere = 0
        self._entries: list[_Entry] = []

    def add(self, name: str, content: bytes) -> int:
        """Append an entry; returns where in `content` its bytes begin."""
        entry = self._begin(name, len(content), zlib.crc32(content))
        begin = len(self.content)
        self.content += content
        self._end(name, entry)
        return begin

    def add_elsewhere(self, name: str, size: int) -> int:
        """Append an entry whose ``size`` bytes are not kept here; returns where they would begin."""
        entry = self._begin(name, size, 0)
        begin = len(self.content)
        self._elsewhere += size
        self._end(name, entry)
        return begin

    def finish(self) -> None:
        """Append the central directory and the end records."""
        begin = self._offset
        for entry in self._entries:
            self._list(entry)
        size, end, count = self._offset - begin, self._offset, len(self._entries)
        self.content += struct.pack(
            "<4sQHHIIQQQQ",
            b"PK\x06\x06",
            44,
            0x031E,
            45,
            0,
            0,
            count,
            count,
            size,
            begin,
        )
        self.content += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
        short_begin = min(begin, _ZIP64_LIMIT)
        self.content += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, size, short_begin, 0)

    @property
    def _offset(self) -> int:
        return len(self.content) + self._elsewhere

    def _begin(self, name: str, size: int, checksum: int) -> _Entry:
        flags = _UTF8_FLAG | (_DESCRIPTOR_FLAG if size else 0)
        entry = _Entry((_PREFIX + name).encode(), size, self._offset, flags, checksum)
        extra = entry.zip64_field(0)
        start = self._offset + 30 + len(entry.name) + len(extra) + 4
        padding = -start % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        # Sizes and checksum follow in the data descriptor, so the header has zeros in their place.
        self.content += struct.pack(
            "<4sHHHHHIIIHH",
            b"PK\x03\x04",
            0,
            flags,
            0,
            0,
            0,
            0,
            0,
            0,
            len(entry.name),
            len(extra),
        )
        self.content += entry.name + extra
        return entry

    def _end(self, name: str, entry: _Entry) -> None:
        self._entries.append(entry)
        self.checksums_at[name] = []
        if entry.size:
            self.checksums_at[name].append(len(self.content) + 4)
            sizes = "QQ" if entry.zip64_field(0) else "II"
            self.content += struct.pack(f"<4sI{sizes}", b"PK\x07\x08", entry.checksum, entry.size, entry.size)

    def _list(self, entry: _Entry) -> None:
        self.checksums_at[entry.name.decode().removeprefix(_PREFIX)].append(len(self.content) + 16)
        extra = entry.zip64_field(entry.size)
        size, offset = min(entry.size, _ZIP64_LIMIT), min(entry.offset, _ZIP64_LIMIT)
        self.content += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            *(b"PK\x01\x02", 0, 0, entry.flags, 0, 0, 0, entry.checksum, size, size),
            *(len(entry.name), len(extra), 0, 0, 0, 0, offset),
        )
        self.content += entry.name + extra


class _Name(NamedTuple):
    """A class or function that the pickle names; neither is looked up, so that torch need not be there."""

    module: str
    name: str

    def __call__(self) -> None:
        """Only what can be called may be named as a function."""
        raise NotImplementedError


class _Rebuild:
    """Stands for the tensor in the pickle: a call of torch's rebuild function on a named storage."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        storage = STORAGES.get(dtype)
        # A typed storage counts elements, an untyped one counts bytes and needs the dtype beside it.
        count = _count(shape) * (1 if storage else _width(dtype))
        self._function = _Name("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
        no_hooks: OrderedDict[str, Any] = OrderedDict()
        self._arguments = (
            _Storage(_Name("torch", storage) if storage else _UNTYPED, count),
            *(0, shape, _contiguous_strides(shape), False, no_hooks),
            *(() if storage else (_Name("torch", dtype),)),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._function, self._arguments


_UNTYPED = _Name("torch.storage", "UntypedStorage")


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: _Name
    count: int


# The one that is written in Python can be taught to write a name.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):  # type: ignore[misc]  # its base is private
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        return ("storage", obj.kind, "0", "cpu", obj.count) if isinstance(obj, _Storage) else None

    def _save_name(self, name: _Name) -> None:
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())
        self.memoize(name)

    dispatch = {**_PythonPickler.dispatch, _Name: _save_name}  # noqa: RUF012


def _pickled_tensor(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Rebuild(dtype, shape))
    return buffer.getvalue()


def _width(dtype: str) -> int:
    width = item_size(dtype)
    if width is None:
        raise ValueError(f"there is no dtype {dtype!r}")
    return width


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _count(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
