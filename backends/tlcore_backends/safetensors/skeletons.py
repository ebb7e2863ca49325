"""Functions that put values of an index together, each made once for a skeleton, whose integers it finds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, overload

# What stands in a value as in its skeleton.
CONSTANT = frozenset((float, str, bool, type(None)))
_STRING = re.compile(rb'"(?:xxh3-128:)?[A-Za-z0-9_./+=-]*"(?!:)')
# Lists of skeletons that are told apart.
_MOST_KINDS = 1 << 14
# From all integers of a value to the value.
Build = Callable[[list[int]], Any]


class KnownSkeletons:
    """What is found out of a table of skeletons, whatever the texts in them that are no keys.

    ``counts`` are those of the values and the integers of each.
    """

    def __init__(self) -> None:
        self.counts: dict[int, tuple[int, int]] = {}
        # Stands for the table, for who must not hold it.
        self.token = object()
        self._kinds: dict[tuple[int, ...], int] = {}
        self._numbers = itertools.count()

    def kind(self, numbers: tuple[int, ...]) -> int:
        """A number for a list of skeletons: of lists that have the same one all are the same."""
        known = self._kinds.get(numbers)
        if known is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            known = self._kinds[numbers] = next(self._numbers)
        return known


class Skeletons(Sequence[Any]):
    """A table of skeletons, made when one is asked for; ``known`` may be another's of the same form."""

    def __init__(
        self, make: Callable[[], list[Any]], count: int, known: KnownSkeletons | None = None
    ) -> None:
        self.known = known or KnownSkeletons()
        self._make = make
        self._count = count

    @classmethod
    def of(cls, table: list[Any]) -> Skeletons:
        """A table that was made."""
        return cls(lambda: table, len(table))

    @cached_property
    def table(self) -> list[Any]:
        """All of them."""
        return self._make()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.table[index]


def form_of(text: bytes) -> bytes | None:
    """A JSON text without what its strings say that are no keys, and that say nothing odd.

    Of equal forms all are JSON if one is, and alike but for these strings. None where that is not certain.
    """
    # Without escapes a quote begins or ends a string, and behind an end stands nothing that this takes.
    return None if b"\\" in text else _STRING.sub(b'""', text)


def builder(skeleton: Any) -> Build:
    """What does for this skeleton as `compact.joined` does. Raises RecursionError for one nested too deep."""
    return _builder(skeleton, 0)[0]


def _builder(node: Any, at: int) -> tuple[Build, int]:
    """The function for a node whose integers begin at ``at``, and where those of the next one begin."""
    if type(node) is int:
        return itemgetter(at), at + 1
    if isinstance(node, dict):
        return _of_object(node, at)
    if isinstance(node, list):
        return _of_list(node, at)
    return lambda numbers: node, at


def _of_object(node: dict[str, Any], at: int) -> tuple[Build, int]:
    inner = {key: each for key, each in node.items() if isinstance(each, (dict, list))}
    if not inner:
        keys = [key for key, each in node.items() if type(each) is int]
        end = at + len(keys)
        return lambda numbers: {**node, **dict(zip(keys, numbers[at:end], strict=True))}, end
    builds: list[tuple[str, Build]] = []
    for key, each in node.items():
        build, at = _builder(each, at)
        builds.append((key, build))
    return lambda numbers: {key: build(numbers) for key, build in builds}, at


def _of_list(node: list[Any], at: int) -> tuple[Build, int]:
    types = list(map(type, node))
    if types.count(int) == len(node):
        end = at + len(node)
        return lambda numbers: numbers[at:end], end
    if CONSTANT.issuperset(types):
        return lambda numbers: node[:], at
    builds: list[Build] = []
    for each in node:
        build, at = _builder(each, at)
        builds.append(build)
    return lambda numbers: [build(numbers) for build in builds], at
