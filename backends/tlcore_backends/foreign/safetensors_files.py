"""The tensors in others' safetensors files: where each lies, from the file's header."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from math import prod
from operator import itemgetter
from typing import TypeAlias

from tlcore.errors import ReadError
from tlcore.layout.checks import is_shape
from tlcore.layout.dtypes import item_size
from tlcore.record import Json

from ..safetensors.remains import DTYPES
from .files import DumpFiles, StoredAt, once, shown_path

_LARGEST_HEADER, _SMALL_HEADER = 100 << 20, 1 << 10
_DTYPES = {
    **DTYPES,
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def safetensors_in(files: DumpFiles, file: str) -> tuple[dict[str, StoredAt], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of its bytes, and its metadata.

    One of a dtype that torch does not have has that of the file. Raises ReadError for a file that is none.
    """
    return once(files, file, lambda: _safetensors_in(files, file))


def _safetensors_in(files: DumpFiles, file: str) -> tuple[dict[str, StoredAt], dict[str, str]]:
    return safetensors_that_begin(files, file, files.read(file, 0, files.first), files.size(file))


def safetensors_that_begin(
    files: DumpFiles, file: str, head: bytes | memoryview, length: int | None
) -> tuple[dict[str, StoredAt], dict[str, str]]:
    """The same of a file whose first bytes, and perhaps whose length, are known."""
    where = shown_path(files, file)
    if len(head) < 8:
        raise ReadError(f"{where}: not a safetensors file, it is too short")
    size = struct.unpack_from("<Q", head)[0]
    if size > _LARGEST_HEADER or head[8:9] not in (b"{", b" "):
        raise ReadError(f"{where}: not a safetensors file (its header would have {size} bytes)")
    if len(head) < 8 + size:
        head = files.read(file, 0, 8 + size)
    try:
        # Those of one-tensor files are mostly alike.
        header = bytes(head[8 : 8 + size])
        described, metadata = _parsed(header) if size <= _SMALL_HEADER else _parsed.__wrapped__(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReadError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None
    whole = 8 + size + (described[-1][2] if described else 0)
    if length is not None and whole > length:
        raise ReadError(f"{where}: ends too early, {whole - length} bytes of its last tensors are missing")
    if length is not None and whole < length:
        raise ReadError(f"{where}: damaged, {length - whole} bytes behind its last tensor are nobody's")
    found = {name: StoredAt(file, 8 + size + at, dtype, shape) for name, at, _, dtype, shape in described}
    return found, dict(metadata)


_Described: TypeAlias = tuple[str, int, int, str, tuple[int, ...]]


@lru_cache(256)
def _parsed(header: bytes) -> tuple[list[_Described], dict[str, str]]:
    """What a header says: of each tensor name, begin and end behind the header, dtype and shape.

    They lie one behind the other without gaps, as the library itself demands; so none shares another's bytes.
    """
    document = json.loads(header)
    metadata = document.pop("__metadata__", None) or {}
    if not all(type(each) is str for each in metadata.values()):
        raise ValueError("its metadata are no texts")
    found = sorted((_described(name, entry) for name, entry in document.items()), key=itemgetter(1, 2))
    reached = 0
    for name, begin, end, _, _ in found:
        if begin != reached:
            raise ValueError(f"{name!r} begins at {begin} and the tensor before it ends at {reached}")
        reached = end
    return found, metadata


def _described(name: str, entry: Json) -> _Described:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
    if not is_shape(shape) or type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError(f"a shape or offset of {name!r} makes no sense")
    width = item_size(dtype)
    if width is not None and end - start != prod(shape) * width:
        raise ValueError(f"the offsets of {name!r} are not those of its shape")
    return name, start, end, dtype, tuple(shape)
