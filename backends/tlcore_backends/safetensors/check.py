"""Whether a step's shards are what ``step.json`` says: their sizes, their headers, who owns which bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.checksums import digest
from tlcore.layout.run_files import RunFiles, parse
from tlcore.record import Json

_LENGTH_BYTES = 8
# Twice the longest header that the safetensors backend writes.
_LARGEST_HEADER = 32 << 20


def shard_problems(files: RunFiles, document: Json) -> Iterator[str]:
    """A line for each thing that is wrong with the shards of a ``step.json`` that was checked."""
    for shard in document.get("shards", []):
        if files.size(shard["file"]) != shard["bytes"]:
            yield f"missing or of another size than in step.json: {str(shard)[:200]}"
    overlap = overlapping(document)
    if overlap is not None:
        yield overlap
    heads = {str(each["file"]): each.get("head") for each in document.get("shards", [])}
    records = _by_shard(document)
    for name in dict.fromkeys((*heads, *records)):
        if files.size(name) is not None:
            try:
                yield from _header_problems(files, name, records.get(name, []), heads.get(name))
            except ReadError as error:
                yield str(error)


def overlapping(document: Json) -> str | None:
    """Two tensors that claim the same bytes, though neither is marked as the other's alias; or None."""
    for name, records in _by_shard(document).items():
        places = sorted((*record["offsets"], record["name"]) for record in records if record["bytes"])
        for (_, end, one), (begin, _, other) in pairwise(places):
            if begin < end:
                return f"{name}: {one} and {other} claim the same bytes"
    return None


def _by_shard(document: Json) -> dict[str, list[Json]]:
    """The records that have bytes of their own, by the shard that they name; damaged places are left out."""
    found: dict[str, list[Json]] = defaultdict(list)
    for record in document["records"]:
        if isinstance(record.get("shard"), str) and "alias_of" not in record and _has_offsets(record):
            found[record["shard"]].append(record)
    return found


def _has_offsets(record: Json) -> bool:
    offsets = record.get("offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(each) is int for each in offsets)


def _header_problems(files: RunFiles, name: str, records: list[Json], stated: Any) -> Iterator[str]:
    told = files.read(name, 0, _LENGTH_BYTES)
    length = int.from_bytes(told, "little")
    begin = _LENGTH_BYTES + length
    if length > _LARGEST_HEADER or begin > (files.size(name) or 0):
        yield f"{name}: its header would have {length} bytes, which no shard has"
        return
    text = files.read(name, _LENGTH_BYTES, begin)
    if stated not in (None, digest(told + text)):
        yield f"{name}: its header has another hash than step.json says"
    header: Any = parse(text, f"{files.url}/{name}: header")
    if not isinstance(header, dict):
        yield f"{name}: its header is no JSON object"
        return
    for record in records:
        entry = header.get(record["name"])
        stated = entry.get("data_offsets") if isinstance(entry, dict) else None
        if stated != [offset - begin for offset in record["offsets"]]:
            yield f"{name}: its header places {record['name']} elsewhere than step.json"
