"""The plans of an index that came from anybody: what steps that are alike share, written in runs of numbers.

A run is short to write and long to read, so what plans may have is bound by the index's tables, and all of
them together by what one segment of a capture can have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .array_places import LARGEST, Damaged, numbers_of

# Calls, structures and tensors in all plans of an index: four times where a segment of a capture is closed.
MOST_ITEMS = 4_000_000


class Plan(NamedTuple):
    """What steps that are alike share, by their numbers in the index."""

    calls: Sequence[int]
    structures: Sequence[int]
    arrays: Sequence[int]
    # For each array, which of the step's extents is that of its first dimension.
    groups: Sequence[int]


@dataclass(slots=True)
class KnownPlans:
    """The plans and extents that were read, also for other indexes with the same tables of them."""

    plans: dict[int, Plan] = field(default_factory=dict)
    extents: dict[int, list[int]] = field(default_factory=dict)
    items: int = 0


class StoredPlans:
    """The plans and extents of an index, each read once; ``table`` gives an entry, ``lengths`` of a table."""

    def __init__(
        self,
        table: Callable[[str, Any], Any],
        lengths: Callable[[str], int],
        damaged: Damaged,
        known: KnownPlans,
    ) -> None:
        self._table = table
        self._lengths = lengths
        self._damaged = damaged
        self._known = known
        self._plans, self._extents = known.plans, known.extents

    def of(self, number: Any) -> Plan:
        """A plan of the index. Raises ReadError."""
        known = self._plans.get(number) if type(number) is int else None
        if known is None:
            entry = self._table("plans", number)
            if not isinstance(entry, dict):
                raise self._damaged(f"plan {number} is no object")
            calls, structures, arrays = (
                self._run(entry.get(key), key) for key in ("calls", "structures", "arrays")
            )
            known = Plan(calls, structures, arrays, self._repeated(entry.get("extents"), len(arrays)))
            self._plans[number] = known
        return known

    def extents(self, number: Any) -> list[int]:
        """How many rows a step's tensors have. Raises ReadError."""
        known = self._extents.get(number) if type(number) is int else None
        if known is None:
            known = self._extents[number] = numbers_of(self._table("extents", number), self._damaged)
        return known

    def _run(self, pairs: Any, table: str) -> list[int]:
        """``[5, 3, 2, 1]`` as 5, 6, 7, 2: entries of a table."""
        begins, counts = self._pairs(pairs)
        length = self._lengths(table)
        if any(begin + count > length for begin, count in zip(begins, counts, strict=True)):
            raise self._damaged(f"a run of numbers leads out of {table!r}")
        self._count(sum(counts))
        found = list(itertools.chain.from_iterable(map(range, begins, map(int.__add__, begins, counts))))
        if table != "calls" and len(set(found)) != len(found):
            raise self._damaged(f"a plan has one of the {table} twice")
        return found

    def _repeated(self, pairs: Any, arrays: int) -> list[int]:
        """``[5, 3, 2, 1]`` as 5, 5, 5, 2: a number for each array."""
        numbers, counts = self._pairs(pairs)
        if sum(counts) != arrays:
            raise self._damaged("a plan says nothing of some array's rows")
        self._count(arrays)
        return list(itertools.chain.from_iterable(map(itertools.repeat, numbers, counts)))

    def _pairs(self, pairs: Any) -> tuple[list[int], list[int]]:
        numbers = numbers_of(pairs, self._damaged, LARGEST)
        if len(numbers) % 2:
            raise self._damaged("a run of numbers makes no sense")
        return numbers[::2], numbers[1::2]

    def _count(self, items: int) -> None:
        self._known.items += items
        if self._known.items > MOST_ITEMS:
            raise self._damaged("its plans have more tensors than any segment's")
