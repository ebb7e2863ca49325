"""Values of an index that are told as differences to those of the steps before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import add, lt
from typing import Any, NamedTuple

import numpy as np

from tlcore.errors import ReadError

from .compact import joined
from .skeletons import Build, KnownSkeletons, builder

_LARGEST_CHANGED = 1 << 200
# What the values of one step may consist of, all together: a list of few numbers can repeat a large value.
_MOST_PARTS = 4_000_000
# What is put together by what was made for it once: values of so many parts, of so many skeletons.
_MOST_BUILT, _MOST_BUILDERS = 1 << 14, 1 << 12
# Changes that are kept as they were checked: of so many numbers, and so many of them.
_MOST_KEPT_PARTS, _MOST_KEPT = 1 << 6, 1 << 12
_PLAIN = frozenset((int, float, str, bool, type(None)))
# Sums of so many differences (`MOST_AHEAD`) to such a number stay within 64 bits.
_LARGEST_BASE, _LARGEST_STEP, MOST_AHEAD = 1 << 60, 1 << 44, 1 << 14
Numbers = np.ndarray[Any, np.dtype[np.int64]]
_NOTHING: tuple[Numbers, Numbers] = np.empty(0, np.int64), np.empty(0, np.int64)


class Told(NamedTuple):
    """A value: its skeleton by number, and the integers that stand in it."""

    skeleton: int
    numbers: list[int]


class Changing:
    """Puts together values that are told as differences to those with the same skeleton before.

    A step's values are numbers of a skeleton and a change each; steps are mostly asked for in order.
    ``skeletons`` has what was found out of them already.
    """

    def __init__(
        self,
        table: Callable[[str, Any], Any],
        damaged: Callable[[str], ReadError],
        skeletons: KnownSkeletons | None = None,
    ) -> None:
        self._table = table
        self._damaged = damaged
        self._lock = threading.Lock()
        # Counts who has asked.
        self._turn = 0
        self._skeletons = skeletons or KnownSkeletons()
        self._used: set[int] = set()
        self._builders: dict[int, Build | None] = {}
        self._known: dict[int, tuple[list[int], list[int]]] = {}
        self._start()

    def _start(self) -> None:
        self._next = 0
        self._last: dict[int, list[int]] = {}

    def told(self, position: int, pairs_of: Callable[[int], Iterable[tuple[Any, Any]]]) -> list[Told]:
        """What is told of the step at a position; ``pairs_of`` gives any step's."""
        with self._lock:
            self._turn += 1
            if position < self._next:
                self._start()
            try:
                for earlier in range(self._next, position):
                    for skeleton, change in pairs_of(earlier):
                        self._numbers(skeleton, change)
                pairs = list(pairs_of(position))
                if len(pairs) > 1 and sum([self._size(skeleton) for skeleton, _ in pairs]) > _MOST_PARTS:
                    raise self._damaged("a step's values have more parts than any step's")
                # Copied: the next of the same skeleton changes them.
                found = [Told(skeleton, self._numbers(skeleton, change).copy()) for skeleton, change in pairs]
            except BaseException:
                self._start()
                raise
            self._next = position + 1
            return found

    def follow(self, pairs: Iterable[tuple[Any, Any]]) -> list[tuple[int, list[int]]]:
        """The skeletons of the next step's values, and the numbers of each; to be asked step by step."""
        return [(skeleton, self._numbers(skeleton, change)) for skeleton, change in pairs]

    def ahead(self, position: int, steps: Iterable[Sequence[tuple[Any, Any]]]) -> tuple[Numbers, int]:
        """The numbers ``[steps, numbers]`` of values from a position on, of the skeletons of those before it.

        Of as many steps as are sound and fit into 64 bits; of none where the one before was not told last.
        And what is to be told to `went` when they are taken.
        """
        with self._lock:
            found: list[tuple[Numbers, Numbers]] = []
            base, turn = np.empty(0, np.int64), self._turn
            if position == self._next:
                known: dict[tuple[Any, ...], tuple[Numbers, Numbers]] = {}
                for pairs in steps:
                    if not found:
                        base = self._base(pairs)
                    key = tuple([change for _, change in pairs])
                    # Of anything but integers, true would be taken for 1.
                    each = known.get(key) if {int}.issuperset(map(type, key)) else _NOTHING
                    if each is None:
                        each = known[key] = self._changed(pairs)
                    if each is _NOTHING or not len(base):
                        break
                    found.append(each)
        numbers = np.zeros((len(found), len(base)), np.int64)
        for row, (places, differences) in zip(numbers, found, strict=True):
            row[places] = differences
        if found:
            numbers[0] += base
        return np.cumsum(numbers, axis=0), turn

    def went(self, turn: int, position: int, skeletons: Sequence[int], last: Numbers) -> None:
        """The steps before a position were told; the last has these numbers, of these skeletons."""
        with self._lock:
            if turn != self._turn:
                # Another thread has asked meanwhile.
                return
            self._turn += 1
            self._next = position
            numbers, begin = last.tolist(), 0
            for skeleton in skeletons:
                end = begin + len(self._last[skeleton])
                self._last[skeleton], begin = numbers[begin:end], end

    def _base(self, pairs: Sequence[tuple[Any, Any]]) -> Numbers:
        """What the next values of these skeletons differ from; nothing where that is not simple."""
        skeletons = [skeleton for skeleton, _ in pairs]
        if len(set(skeletons)) < len(skeletons) or any(each not in self._last for each in skeletons):
            return np.empty(0, np.int64)
        numbers = [number for each in skeletons for number in self._last[each]]
        if max(numbers, default=0) > _LARGEST_BASE or min(numbers, default=0) < -_LARGEST_BASE:
            return np.empty(0, np.int64)
        return np.array(numbers, np.int64)

    def _changed(self, pairs: Sequence[tuple[Any, Any]]) -> tuple[Numbers, Numbers]:
        """Which numbers of several values change, and by how much; `_NOTHING` where it is not sound."""
        places: list[int] = []
        differences: list[int] = []
        begin = 0
        for skeleton, change in pairs:
            try:
                own, added = self._known.get(change) or self._checked(change)
            except ReadError:
                # Told of by who asks for that step.
                return _NOTHING
            if own and own[-1] >= len(self._last[skeleton]):
                return _NOTHING
            places += [begin + place for place in own]
            differences += added
            begin += len(self._last[skeleton])
        if max(differences, default=0) > _LARGEST_STEP or min(differences, default=0) < -_LARGEST_STEP:
            return _NOTHING
        return np.array(places, np.int64), np.array(differences, np.int64)

    def _size(self, skeleton: Any) -> int:
        """How many values a skeleton consists of."""
        return self._counts(skeleton)[0]

    def _counts(self, skeleton: Any) -> tuple[int, int]:
        found = self._skeletons.counts.get(skeleton) if type(skeleton) is int else None
        if found is None:
            found = self._skeletons.counts[skeleton] = _counts(self._table("skeletons", skeleton))
        return found

    def built(self, told: Told) -> Any:
        """The value that is told. Raises as the error for a damaged index."""
        skeleton, numbers = told
        try:
            if skeleton not in self._used:
                # Making what puts it together takes longer than doing that once.
                self._used.add(skeleton)
                return joined(self._table("skeletons", skeleton), iter(numbers))
            builders = self._builders
            if skeleton not in builders:
                small = self._size(skeleton) <= _MOST_BUILT and len(builders) < _MOST_BUILDERS
                form = self._table("skeletons", skeleton)
                builders[skeleton] = builder(form) if small else None
            build = builders[skeleton]
            if build is not None:
                return build(numbers)
            return joined(self._table("skeletons", skeleton), iter(numbers))
        except RecursionError:
            raise self._damaged("a skeleton is nested too deep") from None

    def _numbers(self, skeleton: Any, change: Any) -> list[int]:
        last = self._last.get(skeleton) if type(skeleton) is int else None
        if last is None:
            last = self._last[skeleton] = [0] * self._counts(skeleton)[1]
        known = self._known.get(change) if type(change) is int else None
        places, differences = known or self._checked(change)
        if not places:
            return last
        if places[-1] >= len(last):
            raise self._damaged("a change of what is not there")
        if len(places) == 1:
            # A row one position on, as nearly all are.
            (place,), (difference,) = places, differences
            number = last[place] + difference
            if not -_LARGEST_CHANGED <= number <= _LARGEST_CHANGED:
                raise self._damaged("a change of what is not there")
            last[place] = number
            return last
        # Of a step's token ids all change: no bytecode is run for each of the numbers but to put it there.
        found = list(map(add, map(last.__getitem__, places), differences))
        if max(found) > _LARGEST_CHANGED or min(found) < -_LARGEST_CHANGED:
            raise self._damaged("a change of what is not there")
        for place, number in zip(places, found, strict=True):
            last[place] = number
        return last

    def _checked(self, change: Any) -> tuple[list[int], list[int]]:
        """The places that a change is of, which ascend, and what is added there."""
        changes = self._table("changes", change)
        if not isinstance(changes, list) or len(changes) % 2 or not set(map(type, changes)) <= {int}:
            raise self._damaged("a change makes no sense")
        places = changes[::2]
        if places and not (places[0] >= 0 and all(map(lt, places, places[1:]))):
            raise self._damaged("a change of what is not there")
        found = places, changes[1::2]
        # Rows that are computed step by step change by the same again and again.
        if len(changes) <= _MOST_KEPT_PARTS and len(self._known) < _MOST_KEPT:
            self._known[change] = found
        return found


def _counts(skeleton: Any) -> tuple[int, int]:
    """How many values a skeleton has, itself among them, and how many of these are integers."""
    waiting: list[Any] = [[skeleton]]
    values = integers = 0
    while waiting:
        node = waiting.pop()
        inner = node if isinstance(node, list) else list(node.values())
        # Mostly lists of token ids: no value of them is looked at by itself.
        types = list(map(type, inner))
        values += len(types)
        integers += types.count(int)
        if not _PLAIN.issuperset(types):
            waiting += [each for each in inner if isinstance(each, (dict, list))]
    return values, integers
