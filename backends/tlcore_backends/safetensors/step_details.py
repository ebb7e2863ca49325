"""What an index says of its steps beside their records: times, ledger, rows, and what only some steps have.

All of it may come from anybody, as the index itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tlcore.errors import ReadError
from tlcore.layout.run_files import STEP_KEYS
from tlcore.record import Json

from .array_places import LARGEST, numbers_of
from .changing import Changing, Numbers, Told
from .compact import time_text
from .skeletons import KnownSkeletons

# The end of the year 9000, in microseconds since 1970.
_LATEST = 221_000_000_000 * 10**6


class Details(NamedTuple):
    """What was told of one step: the values of its details, and of its rows, None where it has none."""

    position: int
    own: Told
    rows: list[Told] | None

    @property
    def kin(self) -> Hashable:
        """Equal for steps that are told by other integers in the same values."""
        return self.own.skeleton, None if self.rows is None else tuple(each.skeleton for each in self.rows)

    @property
    def numbers(self) -> list[int]:
        """The integers of these values in order."""
        found = list(self.own.numbers)
        for each in self.rows or ():
            found += each.numbers
        return found

    @property
    def places(self) -> Details:
        """The same with each integer's place in `numbers` in its stead."""
        end = len(self.own.numbers)
        own, rows = self.own._replace(numbers=list(range(end))), None
        if self.rows is not None:
            rows = []
            for each in self.rows:
                begin, end = end, end + len(each.numbers)
                rows.append(each._replace(numbers=list(range(begin, end))))
        return Details(self.position, own, rows)


class StepDetails:
    """Tells each step's; ``columns`` are those of the index's ``steps``. Raises ReadError."""

    def __init__(
        self,
        columns: dict[str, list[Any]],
        steps: Sequence[int],
        rank: int,
        table: Callable[[str, Any], Any],
        damaged: Callable[[str], ReadError],
        skeletons: KnownSkeletons,
    ) -> None:
        self._columns, self._steps, self._rank = columns, steps, rank
        self._table, self.damaged = table, damaged
        # Steps that follow one another mostly have the same.
        self._last_list: tuple[int, list[tuple[int, int]]] = -1, []
        self._told = Changing(table, damaged, skeletons)
        self._told_rows = Changing(table, damaged, skeletons)

    def of(self, position: int) -> Details:
        """What the step at a position says."""
        skeletons, changes = self._columns["details"], self._columns["change"]
        (own,) = self._told.told(position, lambda at: [(skeletons[at], changes[at])])
        column, rows = self._columns.get("rows"), None
        if column is not None and column[position] is not None:
            lists = column
            rows = self._told_rows.told(
                position, lambda at: () if lists[at] is None else self.row_list(lists[at])
            )
        return Details(position, own, rows)

    def following(self, details: Details, most: int) -> Numbers:
        """The numbers ``[steps, numbers]`` of the steps that follow one, as long as they are its kin.

        Of at most so many; of none where it was not the last that was asked for.
        """
        begin, own = details.position + 1, details.own.skeleton
        skeletons, changes = self._columns["details"], self._columns["change"]
        end = begin
        for each in skeletons[begin : begin + most]:
            if type(each) is not int or each != own:
                break
            end += 1
        numbers, turn = self._told.ahead(begin, ([(own, changes[at])] for at in range(begin, end)))
        if details.rows is None:
            column = self._columns.get("rows")
            first = next((at for at in range(begin, end) if column and column[at] is not None), end)
            numbers = numbers[: first - begin]
        else:
            lists = self._kin_lists(details, begin, begin + len(numbers))
            rows, of_rows = self._told_rows.ahead(begin, lists)
            if len(rows):
                skeletons_of = [each.skeleton for each in details.rows]
                self._told_rows.went(of_rows, begin + len(rows), skeletons_of, rows[-1])
            numbers = np.concatenate((numbers[: len(rows)], rows), axis=1) if len(rows) else numbers[:0]
        if len(numbers):
            width = len(details.own.numbers)
            self._told.went(turn, begin + len(numbers), [own], numbers[-1, :width])
        return numbers

    def _kin_lists(self, details: Details, begin: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """The lists of rows of steps, as long as they have the skeletons of a step's."""
        column, skeletons = self._columns["rows"], [each.skeleton for each in details.rows or ()]
        known: dict[int, bool] = {}
        for number in column[begin:end]:
            if type(number) is not int:
                return
            try:
                own = self.row_list(number)
            except ReadError:
                # Told of by who asks for that step.
                return
            if number not in known:
                known[number] = [each for each, _ in own] == skeletons
            if not known[number]:
                return
            yield own

    def document(self, details: Details) -> Json:
        """A step's document without calls, records and structures."""
        own = self._told.built(details.own)
        if not isinstance(own, dict):
            raise self.damaged("a step's details are no object")
        extra = own.get("extra", {})
        if not isinstance(extra, dict) or not STEP_KEYS.isdisjoint(extra):
            # What stands elsewhere was checked there.
            raise self.damaged("'extra' is no object, or has what the index says itself")
        head = {"layout": 1, "step": self._steps[details.position], "rank": self._rank}
        times = self._times(details.position, own)
        document: Json = {**head, **times, "ledger": own.get("ledger"), "calls": [], "records": [], **extra}
        if details.rows is not None:
            document["rows"] = [self._told_rows.built(each) for each in details.rows]
        return document

    def has_usual_times(self, position: int) -> bool:
        """Whether a calendar has the times of the step at a position."""
        started, took = self._starts[position], self._columns["took"][position]
        if started is None or type(took) is not int:
            return False
        return 0 <= started <= _LATEST and 0 <= started + took <= _LATEST

    def row_list(self, number: Any) -> list[tuple[int, int]]:
        """A list of rows: the skeleton and the change of each."""
        if type(number) is int and number == self._last_list[0]:
            return self._last_list[1]
        flat = numbers_of(self._table("rows", number), self.damaged, LARGEST)
        if len(flat) % 2:
            raise self.damaged("a list of rows makes no sense")
        found = list(zip(flat[::2], flat[1::2], strict=True))
        self._last_list = number, found
        return found

    def _times(self, position: int, details: Json) -> Json:
        started, took = self._starts[position], self._columns["took"][position]
        if started is None or type(took) is not int:
            return {"started": details.get("started"), "ended": details.get("ended")}
        try:
            return {"started": time_text(started), "ended": time_text(started + took)}
        except OverflowError:
            raise self.damaged("a time that no calendar has") from None

    @cached_property
    def _starts(self) -> list[int | None]:
        """When each step began; the column has differences."""
        found: list[int | None] = []
        last = 0
        for change in self._columns["started"]:
            last += change if type(change) is int else 0
            found.append(last if type(change) is int else None)
        return found
