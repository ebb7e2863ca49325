"""Names of a segment's files: rank, number, and for an index the steps that it commits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

DIRECTORY = "segments"
# Longer than this no name gets: a segment of steps without any order is closed early.
LONGEST_STEPS = 150
# A name says in a few letters how many steps there are: a segment is closed long before it has so many.
MOST_STEPS = 1 << 17
_MOST_STEPS = 1 << 20
_LONGEST_NAME = 1000
_LARGEST_NUMBER = 1 << 53
_RANK, _NUMBER = r"(0|[1-9]\d{0,15})", r"(\d{6,16})"
_STEPS = r"\d{1,16}(?:-\d{1,16}(?:by\d{1,16})?)?"
_INDEX = re.compile(rf"{DIRECTORY}/rank_{_RANK}_{_NUMBER}_steps_({_STEPS}(?:,{_STEPS})*)\.json", re.ASCII)
_DATA = re.compile(rf"{DIRECTORY}/rank_{_RANK}_{_NUMBER}(?:_(\d{{1,16}}))?\.safetensors", re.ASCII)


class IndexName(NamedTuple):
    """What an index's name says."""

    file: str
    rank: int
    number: int
    steps: Sequence[int]


def data_name(rank: int, number: int, file: int) -> str:
    """The name of a segment's data file; ``file`` counts them, and most segments have one."""
    more = f"_{file}" if file else ""
    return f"{DIRECTORY}/rank_{rank}_{number:06}{more}.safetensors"


def index_name(rank: int, number: int, steps: Sequence[int]) -> str:
    """The name of a segment's index, which commits its steps."""
    return f"{DIRECTORY}/rank_{rank}_{number:06}_steps_{steps_text(steps)}.json"


def steps_text(steps: Sequence[int]) -> str:
    """``0-99,120,200-300by10``: ascending numbers, in runs with the same distance."""
    parts: list[str] = []
    begin = 0
    while begin < len(steps):
        end, stride = begin + 1, 1
        if end < len(steps):
            stride = steps[end] - steps[begin]
            while end < len(steps) and steps[end] - steps[end - 1] == stride:
                end += 1
        if end - begin == 2 and stride != 1:
            # Two numbers say nothing of a distance, and the second may begin a run of its own.
            end = begin + 1
        first, last = steps[begin], steps[end - 1]
        by = f"by{stride}" if stride != 1 else ""
        parts.append(str(first) if first == last else f"{first}-{last}{by}")
        begin = end
    return ",".join(parts)


def parse_index_name(name: str) -> IndexName | None:
    """What an index's name says; None for any other file, or one that says nonsense."""
    found = _INDEX.fullmatch(name) if len(name) <= _LONGEST_NAME else None
    if found is None:
        return None
    try:
        steps = parse_steps(found[3])
    except ValueError:
        return None
    return IndexName(name, int(found[1]), int(found[2]), steps)


def parse_steps(text: str) -> Sequence[int]:
    """The numbers that `steps_text` wrote. Raises ValueError unless they ascend, and are not too many."""
    ranges = list(map(_range, text.split(",")))
    if len(ranges) == 1:
        return ranges[0]
    if sum(map(len, ranges)) > _MOST_STEPS:
        raise ValueError("too many steps")
    if any(later[0] <= earlier[-1] for earlier, later in itertools.pairwise(ranges)):
        raise ValueError("the steps do not ascend")
    return [number for each in ranges for number in each]


def _range(text: str) -> range:
    first, _, rest = text.partition("-")
    last, _, by = rest.partition("by")
    begin, end, stride = int(first), int(last or first), int(by or 1)
    if not (begin <= end < _LARGEST_NUMBER and stride >= 1 and (end - begin) % stride == 0):
        raise ValueError(f"{text} is no range of steps")
    found = range(begin, end + 1, stride)
    if len(found) > _MOST_STEPS:
        raise ValueError("too many steps")
    return found


def catalogue_name(rank: int) -> str:
    """The file that lists a rank's segments once its run is closed."""
    return f"{DIRECTORY}/catalogue_rank_{rank}.json"


def is_data(name: str) -> bool:
    """Whether a file's name is one that a segment's data file has."""
    return _DATA.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """Whether a file of a run commits steps by segments."""
    return _INDEX.fullmatch(name) is not None


def rank_of_file(name: str) -> int | None:
    """The rank that wrote a file of a segment; None for any other file."""
    found = _INDEX.fullmatch(name) or _DATA.fullmatch(name)
    return int(found[1]) if found else None
