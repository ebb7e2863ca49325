"""Whether a segment's files are what its index says: their sizes, their headers, who owns which bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from tlcore.errors import BackendError, ReadError
from tlcore.layout.run_files import parse
from tlcore.storage import Store

from .columns import LENGTH_BYTES
from .index import SegmentIndex

# Far more than any segment's header has.
_LARGEST_HEADER = 100 << 20


def segment_problems(
    store: Store, index: SegmentIndex, sizes: Mapping[str, int], thorough: bool
) -> Iterator[str]:
    """A line for each thing that is wrong with a segment's arrays and files."""
    try:
        extents = index.extents_of_arrays()
    except ReadError as error:
        yield str(error)
        return
    by_file: dict[int, list[_Extent]] = {}
    for place, begin, end, key in extents:
        by_file.setdefault(place, []).append(_Extent(begin, end, key))
    for number, (file, size) in enumerate(index.files):
        mine = by_file.get(number, [])
        own = sorted(each for each in mine if each.end > each.begin)
        for one, other in pairwise(own):
            if other.begin < one.end:
                yield f"{file}: {one.key} and {other.key} claim the same bytes"
        if thorough and sizes.get(file) != size:
            yield f"missing or of another size than in the index: {file}"
        elif thorough:
            yield from _header_problems(store, file, size, mine)


class _Extent(NamedTuple):
    begin: int
    end: int
    key: str


def _header_problems(store: Store, file: str, size: int, arrays: Sequence[_Extent]) -> Iterator[str]:
    try:
        length = int.from_bytes(store.get(file, 0, LENGTH_BYTES), "little")
        begin = LENGTH_BYTES + length
        if length > _LARGEST_HEADER or begin > size:
            yield f"{file}: its header would have {length} bytes, which no segment has"
            return
        header = parse(store.get(file, LENGTH_BYTES, begin), f"{store.url}/{file}: header")
    except (BackendError, OSError, ReadError) as error:
        yield f"{file}: its header cannot be read ({error})"
        return
    if not isinstance(header, dict):
        yield f"{file}: its header is no JSON object"
        return
    for first, last, key in arrays:
        entry = header.get(key)
        stated = entry.get("data_offsets") if isinstance(entry, dict) else None
        if stated != [first - begin, last - begin]:
            yield f"{file}: its header places {key} elsewhere than the index"
