"""Values of an index that are told as differences to those of the steps before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from operator import add, lt
from typing import Any, NamedTuple

from tlcore.errors import ReadError

from .compact import joined
from .skeletons import Build, builder

_LARGEST_CHANGED = 1 << 200
# What the values of one step may consist of, all together: a list of few numbers can repeat a large value.
_MOST_PARTS = 4_000_000
# What is put together by what was made for it once: values of so many parts, of so many skeletons.
_MOST_BUILT, _MOST_BUILDERS = 1 << 14, 1 << 12
# Changes that are kept as they were checked: of so many numbers, and so many of them.
_MOST_KEPT_PARTS, _MOST_KEPT = 1 << 6, 1 << 12
_PLAIN = frozenset((int, float, str, bool, type(None)))


class Told(NamedTuple):
    """A value: its skeleton by number, and the integers that stand in it."""

    skeleton: int
    numbers: list[int]


class Changing:
    """Puts together values that are told as differences to those with the same skeleton before.

    A step's values are numbers of a skeleton and a change each; steps are mostly asked for in order.
    """

    def __init__(self, table: Callable[[str, Any], Any], damaged: Callable[[str], ReadError]) -> None:
        self._table = table
        self._damaged = damaged
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
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

    def _size(self, skeleton: Any) -> int:
        """How many values a skeleton consists of."""
        size = self._sizes.get(skeleton) if type(skeleton) is int else None
        if size is None:
            size = self._sizes[skeleton] = _counts(self._table("skeletons", skeleton))[0]
        return size

    def built(self, told: Told) -> Any:
        """The value that is told. Raises as the error for a damaged index."""
        skeleton, numbers = told
        try:
            if skeleton not in self._used:
                # Making what puts it together takes longer than doing that once.
                self._used.add(skeleton)
                return joined(self._table("skeletons", skeleton), iter(numbers))
            if skeleton not in self._builders:
                small = self._size(skeleton) <= _MOST_BUILT and len(self._builders) < _MOST_BUILDERS
                form = self._table("skeletons", skeleton)
                self._builders[skeleton] = builder(form) if small else None
            build = self._builders[skeleton]
            if build is not None:
                return build(numbers)
            return joined(self._table("skeletons", skeleton), iter(numbers))
        except RecursionError:
            raise self._damaged("a skeleton is nested too deep") from None

    def _numbers(self, skeleton: Any, change: Any) -> list[int]:
        form = self._table("skeletons", skeleton)
        last = self._last.get(skeleton)
        if last is None:
            last = self._last[skeleton] = [0] * _counts(form)[1]
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
