"""What an index says of a step's requests: many flat objects, mostly as in the step before but for numbers.

All of them are compared at once: a look at each takes longer than all else that is said of a small step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress
from operator import sub
from typing import Any

from tlcore.layout.templates import compact

from .compact import Changing, Splitter, Table, listed, split

_PLAIN = frozenset((int, str, type(None), list))


class AlikeObjects:
    """`split` for lists of objects; that of the last list is known where only numbers differ."""

    def __init__(self) -> None:
        self._form: tuple[list[Any], ...] | None = None
        self._types: list[type] | None = None
        self._lists: list[int] = []
        self._is_number: list[bool] = []
        self._is_text: list[bool] = []
        self.text = ""

    def split(self, objects: Sequence[Any]) -> tuple[str, list[int]]:
        """What `split` says."""
        numbers = self.numbers(objects)
        if numbers is None:
            form, self._form = self._form, None
            self.text, numbers = split(objects)
            # Only now: of what is refused there is no text.
            self._form = form
        return self.text, numbers

    def forget(self) -> None:
        """The last list is not what the next one is to be compared with."""
        self._form = None

    def numbers(self, objects: Sequence[Any]) -> list[int] | None:
        """Their integers, where all else is as it was in the last list; None where it is not."""
        if set(map(type, objects)) != {dict}:
            self._form = None
            return None
        values = list(chain.from_iterable(map(dict.values, objects)))
        types = list(map(type, values))
        if types != self._types and not self._take(types):
            return None
        for place in self._lists:
            one = values[place]
            if len(one) != 1 or type(one[0]) is not int:
                self._form = None
                return None
            values[place] = one[0]
        keys, sizes = list(chain.from_iterable(objects)), list(map(len, objects))
        form = keys, sizes, list(compress(values, self._is_text))
        last, self._form = self._form, form
        return list(compress(values, self._is_number)) if form == last else None

    def _take(self, types: list[type]) -> bool:
        """Note where numbers stand, and where texts."""
        self._form = None
        if not _PLAIN.issuperset(types):
            self._types = None
            return False
        self._types = types
        self._lists = [place for place, kind in enumerate(types) if kind is list]
        self._is_number = [kind is int or kind is list for kind in types]
        self._is_text = [not each for each in self._is_number]
        return True


class Details:
    """`split` for what a step says of itself, in which lists of objects are alike from step to step."""

    def __init__(self) -> None:
        self._known: dict[str, AlikeObjects] = {}
        self._last: tuple[str, tuple[str, list[int]]] = "", ("", [])

    def split(self, details: Mapping[str, Any]) -> tuple[str, list[int]]:
        """What `split` says."""
        return self._joined(details, self._extra)

    def _extra(self, key: str, value: Any) -> tuple[str, list[int]]:
        if key == "extra" and type(value) is dict:
            return self._joined(value, self._own)
        # Mostly the ledger of the step before. Unlike equality, this tells 1 from 1.0 and from true.
        shown = repr(value)
        if shown != self._last[0]:
            self._last = shown, split(value)
        return self._last[1]

    def _own(self, key: str, value: Any) -> tuple[str, list[int]]:
        if type(value) is list and len(value) > 1:
            return self._known.setdefault(key, AlikeObjects()).split(value)
        return split(value)

    @staticmethod
    def _joined(items: Mapping[str, Any], split_item: Any) -> tuple[str, list[int]]:
        if not all(type(key) is str for key in items):
            return split(items)
        texts, numbers = list[str](), list[int]()
        for key, value in items.items():
            text, own = split_item(key, value)
            texts.append(f"{compact(key)}:{text}")
            numbers += own
        return "{" + ",".join(texts) + "}", numbers


class RowLists:
    """Lists of a step's rows in an index, each row told as its difference to the last with its skeleton."""

    def __init__(self, skeletons: Table, deltas: Table, lists: Table) -> None:
        self._rows = Changing(skeletons, deltas)
        self._lists = lists
        self._splitter = Splitter()
        self._alike = AlikeObjects()
        # Of the last list: its number, its rows' skeletons, their integers, and how these had changed.
        self._number = -1
        self._skeletons: list[int] = []
        self._counts: list[int] = []
        self._numbers: list[int] = []
        self._changes: list[int] | None = None
        self._split: list[tuple[str, list[int]]] | None = None
        self._next: list[int] = []
        self._given: Sequence[Mapping[str, Any]] = ()
        self._is_taken = False

    def take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of the next list, which may be refused now."""
        if self._is_taken:
            # The one before was not told.
            self._alike.forget()
        self._is_taken = True
        numbers = self._alike.numbers(rows)
        self._split = None
        if numbers is None:
            self._split = list(map(self._splitter.split, rows))
            numbers = list(chain.from_iterable(own for _, own in self._split))
        self._next = numbers
        self._given = rows

    def told(self) -> int:
        """The number of the list that was taken."""
        self._is_taken = False
        numbers = self._next
        changes: list[int] | None = None
        if self._split is None:
            changes = list(map(sub, numbers, self._numbers))
            if changes == self._changes:
                self._numbers = numbers
                return self._number
        self._catch_up()
        parts = self._split or list(map(self._splitter.split, self._given))
        told = [self._rows.told(*part) for part in parts]
        self._number = self._lists.number(listed(chain.from_iterable(told)))
        self._skeletons = [skeleton for skeleton, _ in told]
        self._counts = [len(own) for _, own in parts]
        self._numbers = numbers
        # Where a skeleton comes twice, a row is told by another one of the same list.
        self._changes = changes if len(set(self._skeletons)) == len(told) else None
        return self._number

    def _catch_up(self) -> None:
        """Tell of each skeleton with which integers it came last."""
        numbers = iter(self._numbers)
        for skeleton, count in zip(self._skeletons, self._counts, strict=True):
            self._rows.last[skeleton] = [next(numbers) for _ in range(count)]
