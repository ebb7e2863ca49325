"""What an uncommitted step left whole: the tensors of sealed shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.run_files import RunFiles, parse
from tlcore.record import Json

_SHARD_FILE = ".safetensors"
_LENGTH_BYTES = 8
# No header that we write is larger.
_LARGEST_HEADER = 16 << 20
_ALIAS, _DTYPE = "tlcore.alias.", "tlcore.dtype."
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def records_in_shards(files: RunFiles, directory: str) -> dict[str, Json]:
    """Where the tensors in a step's sealed shards lie, by logical name; nothing is known of their origin.

    ``directory`` is the step's. A shard whose header is damaged is left out: nothing of it can be read.
    """
    found: dict[str, Json] = {}
    for name in sorted(files.sizes_in(directory)):
        if name.startswith(f"{directory}/") and name.endswith(_SHARD_FILE):
            found.update((record["name"], record) for record in _in_shard(files, name, directory))
    return found


def _in_shard(files: RunFiles, shard: str, directory: str) -> Iterator[Json]:
    try:
        length = int.from_bytes(files.read(shard, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _LARGEST_HEADER:
            return
        text = files.read(shard, _LENGTH_BYTES, _LENGTH_BYTES + length)
        header: Any = parse(text, f"{files.url}/{shard}: header")
        marks: dict[str, str] = header.pop("__metadata__", {})
        begin = _LENGTH_BYTES + length
        records = {name: _record(name, entry, shard, begin, marks) for name, entry in header.items()}
        for mark, original in marks.items():
            if mark.startswith(_ALIAS) and original in records:
                name = mark.removeprefix(_ALIAS)
                records[name] = {**records[original], "name": name}
    except (ReadError, ValueError, TypeError, KeyError, AttributeError):
        return
    yield from (record for name, record in records.items() if name.startswith(f"{directory}/"))


def _record(name: str, entry: Any, shard: str, begin: int, marks: dict[str, str]) -> Json:
    dtype, shape = marks.get(_DTYPE + name), list(entry["shape"])
    if dtype is None:
        dtype = DTYPES[entry["dtype"]]
    else:
        # A dtype that the format lacks is stored as raw numbers in one more dimension.
        shape.pop()
    first, last = entry["data_offsets"]
    place = {"shard": shard, "offsets": [begin + first, begin + last]}
    return {"name": name, "dtype": dtype, "shape": shape, "bytes": last - first, **place}
