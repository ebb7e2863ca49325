"""Values of an index that are told as differences to those of the steps before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from operator import add, lt
from typing import Any

from tlcore.errors import ReadError

from .compact import joined
from .skeletons import Build, builder

_LARGEST_CHANGED = 1 << 200
# What the values of one step may consist of, all together: a list of few numbers can repeat a large value.
_MOST_PARTS = 4_000_000
# What is put together by what was made for it once: values of so many parts, of so many skeletons.
_MOST_BUILT, _MOST_BUILDERS = 1 << 14, 1 << 12
_PLAIN = frozenset((int, float, str, bool, type(None)))


class Changing:
    """Puts together values that are told as differences to those with the same skeleton before.

    A step's values are numbers of a skeleton and a change each; steps are mostly asked for in order.
    """

    def __init__(self, table: Callable[[str, Any], Any], damaged: Callable[[str], ReadError]) -> None:
        self._table = table
        self._damaged = damaged
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
        self._builders: dict[int, Build | None] = {}
        self._start()

    def _start(self) -> None:
        self._next = 0
        self._last: dict[int, list[int]] = {}

    def values(self, position: int, pairs_of: Callable[[int], Iterable[tuple[Any, Any]]]) -> list[Any]:
        """The values of the step at a position; ``pairs_of`` gives any step's."""
        with self._lock:
            if position < self._next:
                self._start()
            try:
                for earlier in range(self._next, position):
                    for skeleton, change in pairs_of(earlier):
                        self._numbers(skeleton, change)
                pairs = list(pairs_of(position))
                if len(pairs) > 1 and sum(self._size(skeleton) for skeleton, _ in pairs) > _MOST_PARTS:
                    raise self._damaged("a step's values have more parts than any step's")
                found = [self._value(*pair) for pair in pairs]
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

    def _value(self, skeleton: Any, change: Any) -> Any:
        numbers = self._numbers(skeleton, change)
        try:
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
        changes = self._table("changes", change)
        if not isinstance(changes, list) or len(changes) % 2 or not set(map(type, changes)) <= {int}:
            raise self._damaged("a change makes no sense")
        # Of a step's token ids all change: no bytecode is run for each of the numbers but to put it there.
        places = changes[::2]
        if places:
            ascend = places[0] >= 0 and places[-1] < len(last) and all(map(lt, places, places[1:]))
            found = list(map(add, map(last.__getitem__, places), changes[1::2])) if ascend else []
            if not found or max(found) > _LARGEST_CHANGED or min(found) < -_LARGEST_CHANGED:
                raise self._damaged("a change of what is not there")
            for place, number in zip(places, found, strict=True):
                last[place] = number
        return last


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
