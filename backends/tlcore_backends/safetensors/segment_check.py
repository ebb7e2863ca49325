"""Whether a segment's files are what its index says: their sizes, their headers, who owns which bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from tlcore.errors import BackendError, ReadError
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
    for number, (file, size) in enumerate(index.files):
        mine = sorted(
            (begin, end, key) for place, begin, end, key in extents if place == number and end > begin
        )
        own = [each for each in mine if each[1] > each[0]]
        for (_, end, one), (begin, _, other) in pairwise(own):
            if begin < end:
                yield f"{file}: {one} and {other} claim the same bytes"
        if thorough and sizes.get(file) != size:
            yield f"missing or of another size than in the index: {file}"
        elif thorough:
            yield from _header_problems(store, file, size, [each for each in extents if each[0] == number])


def _header_problems(
    store: Store, file: str, size: int, arrays: list[tuple[int, int, int, str]]
) -> Iterator[str]:
    try:
        length = int.from_bytes(store.get(file, 0, LENGTH_BYTES), "little")
        begin = LENGTH_BYTES + length
        if length > _LARGEST_HEADER or begin > size:
            yield f"{file}: its header would have {length} bytes, which no segment has"
            return
        header: Any = json.loads(store.get(file, LENGTH_BYTES, begin))
    except (BackendError, OSError, ValueError, RecursionError) as error:
        yield f"{file}: its header cannot be read ({error})"
        return
    if not isinstance(header, dict):
        yield f"{file}: its header is no JSON object"
        return
    for _, first, last, key in arrays:
        entry = header.get(key)
        stated = entry.get("data_offsets") if isinstance(entry, dict) else None
        if stated != [first - begin, last - begin]:
            yield f"{file}: its header places {key} elsewhere than the index"
