"""Whether a segment's files are what its index says: their sizes, their headers, who owns which bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from tlcore.errors import BackendError, ReadError
from tlcore.layout.checksums import digest
from tlcore.layout.run_files import parse
from tlcore.storage import Store

from .columns import LENGTH_BYTES
from .index import SegmentIndex

# Far more than any segment's header has.
_LARGEST_HEADER = 100 << 20
# A head that others are compared with.
_LARGEST_KEPT = 1 << 20


def segment_problems(
    store: Store,
    index: SegmentIndex,
    sizes: Mapping[str, int],
    thorough: bool,
    without_heads: Collection[int] = (),
) -> Iterator[str]:
    """A line for each thing that is wrong with a segment's arrays and files.

    ``without_heads`` has the numbers of files whose heads somebody else looks at.
    """
    try:
        found = _placed(index)
    except ReadError as error:
        yield str(error)
        return
    for number, (file, size) in enumerate(index.files):
        mine, overlaps = found.get(number, _NOTHING)
        for one, other in overlaps:
            yield f"{file}: {one} and {other} claim the same bytes"
        if thorough and sizes.get(file) != size:
            yield f"missing or of another size than in the index: {file}"
        elif thorough and number not in without_heads:
            yield from _head_problems(store, index, number, mine)


class Head(NamedTuple):
    """What stands before the tensors of a file: how many bytes, and their hash."""

    size: int
    digest: str


class _Extent(NamedTuple):
    begin: int
    end: int
    key: str


class _Placed(NamedTuple):
    """The arrays of a file, and the keys of those that claim the same bytes."""

    arrays: list[_Extent]
    overlaps: list[tuple[str, str]]


_NOTHING = _Placed([], [])


def _placed(index: SegmentIndex) -> dict[int, _Placed]:
    """The arrays by the number of their file; of indexes that are alike the same. Raises ReadError."""
    known: dict[int, _Placed] | None = index.common.extents.get(index.layout)
    if known is None:
        known = {}
        for place, begin, end, key in index.extents_of_arrays():
            known.setdefault(place, _Placed([], [])).arrays.append(_Extent(begin, end, key))
        for arrays, overlaps in known.values():
            own = sorted(each for each in arrays if each.end > each.begin)
            overlaps += ((one.key, other.key) for one, other in pairwise(own) if other.begin < one.end)
        index.common.keep(index.common.extents, index.layout, known)
    return known


def sound_head(index: SegmentIndex, number: int) -> Head | None:
    """What a file begins with if nothing is wrong with that; None where it must be read to be known."""
    known: Head | None = index.common.heads.get((number, index.layout))
    there = known is not None and known.size <= index.files[number][1]
    return known if there and known and known.digest == index.heads[number] else None


def _head_problems(
    store: Store, index: SegmentIndex, number: int, arrays: Sequence[_Extent]
) -> Iterator[str]:
    """What is wrong with a file's header; of one that is sound its hash is remembered."""
    (file, size), stated = index.files[number], index.heads[number]
    head: list[bytes] = []
    problems = list(_header_problems(store, file, size, arrays, head))
    found = digest(head[0]) if head else None
    if not problems and stated not in (None, found):
        problems = [f"{file}: its header has another hash than its index says"]
    if not problems and found is not None and len(head[0]) <= _LARGEST_KEPT:
        index.common.keep(index.common.heads, (number, index.layout), Head(len(head[0]), found))
    yield from problems


def _header_problems(
    store: Store, file: str, size: int, arrays: Sequence[_Extent], head: list[bytes]
) -> Iterator[str]:
    """``head`` gets all that was read."""
    try:
        told = store.get(file, 0, LENGTH_BYTES)
        length = int.from_bytes(told, "little")
        begin = LENGTH_BYTES + length
        if length > _LARGEST_HEADER or begin > size:
            yield f"{file}: its header would have {length} bytes, which no segment has"
            return
        text = store.get(file, LENGTH_BYTES, begin)
        header = parse(text, f"{store.url}/{file}: header")
    except (BackendError, OSError, ReadError) as error:
        yield f"{file}: its header cannot be read ({error})"
        return
    if not isinstance(header, dict):
        yield f"{file}: its header is no JSON object"
        return
    head.append(told + text)
    for first, last, key in arrays:
        entry = header.get(key)
        stated = entry.get("data_offsets") if isinstance(entry, dict) else None
        if stated != [first - begin, last - begin]:
            yield f"{file}: its header places {key} elsewhere than the index"
