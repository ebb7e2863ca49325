"""numpy's files: arrays in ``.npy`` and ``.npz``, never objects."""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from tlcore.errors import ReadError
from tlcore.layout.checks import is_shape
from tlcore.record import Json
from tlcore.storage import Buffer

from .documents import Found
from .files import DumpFiles, Readable, read_at, shown_path

_NAMES = {
    "?": "bool",
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "u8": "uint64",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}
_LARGEST_HEADER = 10_000
_LOCAL_BYTES = 30
_LOW_BYTES = 2


class ArrayHeader:
    """What stands before an array's bytes: its dtype, shape and order, and how many bytes that takes."""

    def __init__(self, stream: Any, where: str) -> None:
        try:
            self.dtype, self.fortran, self.shape = _header(stream)
        except (ValueError, TypeError, KeyError, SyntaxError, OSError, MemoryError, RecursionError) as error:
            raise ReadError(f"{where}: not an array of numpy ({error})") from None
        except zipfile.BadZipFile as error:
            raise ReadError(f"{where}: {error}") from None
        self.size = stream.tell()
        kind = self.dtype.str[1:] if self.dtype.str[1:] != "b1" else "?"
        self.name = _NAMES.get(kind)

    @property
    def skipped(self) -> str | None:
        """Why the array is no tensor; None where it is one."""
        if self.dtype.hasobject:
            return "an array of objects, which would have to be unpickled"
        if self.name:
            return None
        text = f"an array of {self.dtype.str}, which torch has no dtype for"
        if self.dtype.kind == "V" and self.dtype.itemsize <= _LOW_BYTES:
            text += "; dtypes of ml_dtypes (bfloat16) have no names in numpy's files: save it as float32"
        return text

    @property
    def direct(self) -> bool:
        """Whether its bytes are those of the tensor."""
        return not self.fortran and self.dtype.str[0] != ">"


def _header(stream: Any) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    magic = stream.read(8)
    if len(magic) != 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it does not begin as one")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _LARGEST_HEADER:
        raise ValueError("its header is too large")
    entry = ast.literal_eval(stream.read(length).decode("latin-1"))
    shape = entry["shape"]
    if not is_shape(list(shape)):
        raise ValueError("its shape makes no sense")
    return np.dtype(entry["descr"]), bool(entry["fortran_order"]), tuple(shape)


def describe_npy(files: Readable, file: str, module: str) -> Found:
    """The array of an ``.npy`` file as a module's output. Raises ReadError."""
    head = files.read(file, 0, _LARGEST_HEADER + 16)
    header = ArrayHeader(io.BytesIO(head), f"{shown_path(files, file)}")
    place: Json = {"file": file, "at": header.size} if header.direct else {"npy": file, "skip": header.size}
    return _found(module, header, place)


def describe_npz(files: DumpFiles, file: str) -> Iterator[tuple[str, Found]]:
    """Each array of an ``.npz`` file with its name. Raises ReadError."""
    with _archive(files, file) as archive:
        for member in archive.infolist():
            where = f"{shown_path(files, file)}: {member.filename!r}"
            try:
                with archive.open(member) as stream:
                    header = ArrayHeader(stream, where)
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
                raise ReadError(f"{where}: cannot be read ({error})") from None
            name = member.filename.removesuffix(".npy")
            place: Json = {"npz": file, "member": member.filename}
            if header.direct and member.compress_type == zipfile.ZIP_STORED:
                local = files.read(file, member.header_offset, member.header_offset + _LOCAL_BYTES)
                skip = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                at = member.header_offset + _LOCAL_BYTES + skip + header.size
                place = {"file": file, "at": at}
            yield name, _found(name, header, place)


def read_npy(files: Readable, record: Any) -> Buffer:
    """The values of a record whose place is one of `describe_npy`."""
    place, size = record["place"], int(record["bytes"])
    if "at" in place:
        return read_at(files, record)
    data = files.read(place["npy"], 0, place["skip"] + size)
    return _in_order(io.BytesIO(data), size, f"{shown_path(files, place['npy'])}")


def read_array(files: DumpFiles, record: Any) -> Buffer:
    """The values of a record whose place is one of `describe_npy` or `describe_npz` that is not direct."""
    place = record["place"]
    size = int(record["bytes"])
    if "npy" in place:
        return read_npy(files, record)
    where = f"{shown_path(files, place['npz'])}: {place['member']!r}"
    try:
        with _archive(files, place["npz"]) as archive, archive.open(place["member"]) as stream:
            return _in_order(stream, size, where)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, KeyError) as error:
        raise ReadError(f"{where}: cannot be read ({error})") from None


def _in_order(stream: Any, size: int, where: str) -> Buffer:
    """The values one after the other, whatever order the file has them in."""
    header = ArrayHeader(stream, where)
    if header.skipped or prod(header.shape) * header.dtype.itemsize != size:
        raise ReadError(f"{where}: is not the array that it was")
    data = stream.read(size)
    if len(data) != size:
        raise ReadError(f"{where}: ends too early")
    flat = np.frombuffer(data, header.dtype)
    array = flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)
    native = np.ascontiguousarray(array).astype(header.dtype.newbyteorder("<"), copy=False)
    return native.reshape(-1).view(np.uint8).data


def _archive(files: DumpFiles, file: str) -> zipfile.ZipFile:
    opened = files.open(file) or io.BytesIO(files.read(file))
    try:
        return zipfile.ZipFile(opened)
    except (zipfile.BadZipFile, OSError) as error:
        raise ReadError(f"{shown_path(files, file)}: not an .npz file ({error})") from None


def _found(module: str, header: ArrayHeader, place: Json) -> Found:
    if header.skipped:
        return Found(module, "outputs", (), skipped=header.skipped)
    return Found(module, "outputs", (), header.name or "", tuple(header.shape), place)
