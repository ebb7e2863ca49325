"""Reading a segment's index: where each tensor of each step lies, and the step's document.

An index may come from anybody. What is used here is checked here; the documents made of it are checked by
the reader like any other ``step.json``.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.hashes import HASH_PREFIX
from tlcore.protocols import Array, ArrayRows, Outline, StepKinds
from tlcore.record import Json

from .array_places import LARGEST, ArrayOfRows, Places, number_of, numbers_of
from .changing import MOST_AHEAD, Changing, Numbers
from .index_reading import Common
from .kinds import kinds_of
from .record_forms import RecordForm, RecordForms
from .shared_arrays import OwnArrays, OwnPlaces
from .skeletons import KnownSkeletons, Skeletons
from .step_details import Details, StepDetails
from .stored_plans import Plan, StoredPlans
from .stored_structures import StoredStructures
from .tables import Tables

# Who asks for fewer steps does not wait until all were looked at.
_FEW_ASKED = 4
# Of steps that follow one another, told together.
_MOST_NUMBERS = 1 << 21
_COLUMNS = ("number", "plan", "extents", "started", "took", "details", "change")


class SegmentIndex:
    """An index that was read; ``where`` is its name for messages, ``nbytes`` its size as it is stored.

    Raises ReadError, at once or when it is used, for one that makes no sense.
    """

    def __init__(self, document: Any, where: str, nbytes: int = 0, common: Common | None = None) -> None:
        self.where, self.nbytes = where, nbytes
        self.common = common or Common()
        self._token = object()
        tables = self._tables = Tables(document, where)
        # Of the tables, and not of this: then nothing here holds itself.
        self.damaged, self.table = tables.damaged, tables.entry
        self._document = document
        columns = document.get("steps")
        if not isinstance(columns, dict):
            raise self.damaged("'steps' is missing or no object")
        self._columns: dict[str, list[Any]] = columns
        if not all(isinstance(columns.get(key), list) for key in _COLUMNS):
            raise self.damaged("a column of 'steps' is missing")
        count = len(columns["number"])
        if not all(isinstance(column, list) and len(column) == count for column in columns.values()):
            raise self.damaged("the columns of 'steps' have different lengths")
        self.steps: list[int] = self._numbers(columns["number"], LARGEST)
        if any(later <= earlier for earlier, later in itertools.pairwise(self.steps)):
            raise self.damaged("its steps do not ascend")
        self.rank = self._number(document.get("rank"), 1 << 20)
        arrays = document["arrays"]
        self.places = (OwnPlaces if isinstance(arrays, OwnArrays) else Places)(arrays, self.damaged)
        self._plans = StoredPlans(self.table, tables.count, self.damaged, self.common.plans)
        self._record_forms = RecordForms(
            self._plans, self.places, self.table, lambda: tables.files, self.damaged
        )
        self._structures = StoredStructures(self.table, self.damaged)
        self._asked = 0
        self._kinds: list[int] | None = None
        self._counted: tuple[int, dict[int, tuple[int, int]]] = (0, {})
        told = document["skeletons"]
        self._skeletons = told.known if isinstance(told, Skeletons) else KnownSkeletons()
        self._details = StepDetails(columns, self.steps, self.rank, self.table, self.damaged, self._skeletons)

    @property
    def ledger(self) -> Any:
        """What had become of all the rank's tensors by then."""
        return self._document.get("ledger")

    @property
    def files(self) -> list[tuple[str, int]]:
        """The data files and their sizes in bytes. Raises ReadError."""
        return self._tables.files

    @property
    def heads(self) -> list[str | None]:
        """The hash of each data file's head, None where the index has none. Raises ReadError."""
        return self._tables.heads

    def document(self, number: int) -> Json:
        """A step's document as ``step.json`` has it, its records with ``shard`` and ``offsets``.

        Raises ReadError for a step that the index does not have.
        """
        position = self._position(number)
        plan = self.plan(self._columns["plan"][position])
        document = self.rest(number)
        document["calls"] = self.calls_of(self._columns["plan"][position])
        records = document["records"] = self._records(position)
        pair = self._columns["plan"][position], self._columns["extents"][position]
        column = self._columns.get("values")
        document["structures"] = self._structures.of(
            pair,
            plan,
            self.forms_at(position),
            None if column is None else column[position],
            (f"step_{number}", self.rank),
            records,
        )
        used = {record["shard"] for record in records}
        document["shards"] = [{"file": file, "bytes": size} for file, size in self.files if file in used]
        return document

    def rest(self, number: int) -> Json:
        """A step's document without calls, records and structures. Raises as `document`."""
        return self._details.document(self._details.of(self._position(number)))

    def step_kinds(self, number: int) -> StepKinds | None:
        """A step's document by the kinds of its parts. Raises as `document`."""
        plan, extents, _ = self.pair(self._position(number))
        records = self._record_forms.kinds(plan, extents, f"step_{number}")
        structures = self._structures.kinds(plan, self.plan(plan), (f"step_{number}", self.rank), records)
        if structures is None:
            return None
        shards = [{"file": file, "bytes": size} for file, size in self.files]
        rest = {**self.rest(number), "calls": self.calls_of(plan), "shards": shards}
        return StepKinds(rest, records, structures)

    def outline(self, number: int) -> Outline:
        """A step's document without what needs its records. Raises ReadError."""
        position = self._position(number)
        alike = self._token, self._columns["plan"][position], self._columns["extents"][position]
        details = self._details.of(position)
        tell = self._details.document
        return Outline(
            lambda: tell(details),
            alike,
            lambda: self._records(position),
            (self._token, details.kin),
            lambda: details.numbers,
            lambda: tell(details.places),
            lambda most: self._following(details, most),
        )

    def _following(self, details: Details, most: int) -> tuple[Sequence[int], Numbers]:
        """The steps that follow one and are alike and kin, at most so many, and their numbers."""
        begin = details.position + 1
        own = self._columns["plan"][begin - 1], self._columns["extents"][begin - 1]
        most = min(most, MOST_AHEAD, _MOST_NUMBERS // (len(details.numbers) + 1))
        behind = (self._columns[key][begin : begin + most] for key in ("plan", "extents"))
        like = sum(1 for _ in itertools.takewhile(lambda pair: pair == own, zip(*behind, strict=True)))
        numbers = self._details.following(details, like)
        return self.steps[begin : begin + len(numbers)], numbers

    @cached_property
    def layout(self) -> Hashable:
        """With `common`, all that says where which step has its arrays: equal where that is the same."""
        # Of anything but integers, true would be taken for 1.
        numbers = *self._columns["plan"], *self._columns["extents"]
        return (self.places.layout, numbers) if {int}.issuperset(map(type, numbers)) else object()

    def extents_of_arrays(self) -> list[tuple[int, int, int, str]]:
        """Of each array that has bytes of its own: file, begin, end, and key. Raises ReadError."""
        totals, keys = self._firsts(len(self.steps)), self.places.keys
        found = []
        places = zip(*(each.tolist() for each in self.places.columns[:4]), strict=True)
        for number, (file, begin, constant, row_bytes) in enumerate(places):
            if number in keys:
                times, rows = totals.get(number, (0, 0))
                if constant and times:
                    rows //= times
                found.append((file, begin, begin + rows * row_bytes, keys[number]))
        return found

    def arrays(
        self, keys: Collection[str] | None = None, again: Callable[[], SegmentIndex] | None = None
    ) -> Iterator[Array]:
        """Each array over all steps of the segment, by its name; its rows are looked up when asked for.

        ``again`` gives this index then, so that an array does not keep it in memory.
        """
        index = again or (lambda: self)
        totals = self._firsts(len(self.steps))
        for number, entry in enumerate(self._document["arrays"]):
            if isinstance(entry, dict) and number in totals and (keys is None or entry.get("name") in keys):
                yield self._array(number, *totals[number], index)

    def _array(self, number: int, times: int, total: int, index: Callable[[], SegmentIndex]) -> Array:
        place = self.places.of(number)
        if place.constant and total % times:
            raise self.damaged(f"array {number} is constant and has different extents")
        if place.file >= len(self.files):
            raise self.damaged(f"array {number} lies in no file")
        stored = total // times if place.constant else total
        end = place.begin + stored * place.row_bytes
        rows = ArrayOfRows(
            self.files[place.file][0],
            place,
            end,
            times,
            lambda: index().rows_of_array(number),
            lambda: index().begins_of_array(number),
        )
        return Array(self.table("arrays", number)["name"], self.rank, place.dtype, (total, *place.row), rows)

    def rows_of_array(self, number: int) -> list[ArrayRows]:
        """Which rows of an array each step has. Raises ReadError."""
        found: list[ArrayRows] = []
        row = 0
        for position, step in enumerate(self.steps):
            form = self.forms_at(position).get(number)
            if form is not None:
                record = self._record(form, len(found), row, f"step_{step}")
                found.append(ArrayRows(step, row, row + form.rows, record))
                row += form.rows
        return found

    def begins_of_array(self, number: int) -> dict[int, int]:
        """The first row that each step has of an array. Raises ReadError."""
        known: dict[tuple[Any, Any], int | None] = {}
        found: dict[int, int] = {}
        begin = 0
        pairs = zip(self._columns["plan"], self._columns["extents"], strict=True)
        for position, (step, pair) in enumerate(zip(self.steps, pairs, strict=True)):
            rows = known.get(pair, -1)
            if rows == -1:
                form = self.forms_at(position).get(number)
                rows = known[pair] = None if form is None else form.rows
            if rows is not None:
                found[step] = begin
                begin += rows
        return found

    def pair(self, position: int) -> tuple[Any, Any, Any]:
        """The plan, the extents, and the values of the structures that the step at a position has."""
        values = self._columns.get("values")
        plan, extents = self._columns["plan"][position], self._columns["extents"][position]
        return plan, extents, None if values is None else values[position]

    def calls_of(self, plan: Any) -> list[Any]:
        """The calls of a plan, in order. Raises ReadError."""
        return [self.table("calls", call) for call in self.plan(plan).calls]

    def pairs(self) -> tuple[list[tuple[Plan, list[int]]], list[int]]:
        """The plans with the extents that steps have, and for each step which of these. Raises ReadError."""
        known: dict[tuple[int, int], int] = {}
        ids: list[int] = []
        for pair in zip(self._columns["plan"], self._columns["extents"], strict=True):
            if type(pair[0]) is not int or type(pair[1]) is not int:
                raise self.damaged("a step has no plan")
            ids.append(known.setdefault(pair, len(known)))
        return [(self.plan(plan), self._extents(extents)) for plan, extents in known], ids

    def forms(self) -> Iterator[tuple[Any, ...]]:
        """For each step its plan, extents and values; and what else its document depends on.

        Documents of steps with equal ones differ in numbers only, each of which may stand there.
        """
        details = Changing(self.table, self.damaged, self._skeletons)
        rows = Changing(self.table, self.damaged, self._skeletons)
        row_lists = self._columns.get("rows") or itertools.repeat(None)
        values = self._columns.get("values") or itertools.repeat(None)
        told = zip(self._columns["details"], self._columns["change"], strict=True)
        own = zip(self._columns["plan"], self._columns["extents"], values, told, row_lists, strict=False)
        for position, (plan, extents, value, pair, row_list) in enumerate(own):
            ((skeleton, numbers),) = details.follow((pair,))
            # A number that no ledger and no calendar has makes a step one of a kind.
            usual = min(numbers, default=0) >= 0 and max(numbers, default=0) <= LARGEST
            usual = usual and self._details.has_usual_times(position)
            kind = None
            if row_list is not None:
                its = rows.follow(self._details.row_list(row_list))
                # However many steps have the same list of rows, and however many lists are alike.
                kind = self._skeletons.kind(tuple(each for each, _ in its))
            yield plan, extents, value, skeleton, None if usual else position, kind

    def rest_kind(self, form: tuple[Any, ...]) -> Hashable | None:
        """Of one of `forms`: equal for steps whose `rest` is sound if that of one is; None if not known."""
        *_, skeleton, unusual, rows = form
        return (self._skeletons.token, skeleton, rows) if unusual is None else None

    def kind(self, number: int) -> Hashable | None:
        """Equal for steps of this index whose documents are sound if that of one is; None if not known."""
        self._asked += 1
        if self._asked < _FEW_ASKED:
            return None
        if self._kinds is None:
            try:
                self._kinds = kinds_of(self.forms())
            except ReadError:
                self._kinds = []
        return (self._token, self._kinds[self._position(number)]) if self._kinds else None

    def _position(self, number: int) -> int:
        position = bisect_left(self.steps, number)
        if position == len(self.steps) or self.steps[position] != number:
            raise self.damaged(f"it does not have step {number}")
        return position

    def _records(self, position: int) -> list[Json]:
        """A step's records in order."""
        known: dict[tuple[str, str, tuple[int, ...]], str] = {}
        firsts, directory = self._firsts(position), f"step_{self.steps[position]}"
        found = []
        for form in self.forms_at(position).values():
            record = self._record(form, *firsts.get(form.array, (0, 0)), directory)
            # Equal bytes and meaning: an alias of the first such record, which stands before its own place.
            content = record["hash"], str(record.get("dtype")), form.shape
            original = known.setdefault(content, record["name"])
            if original is not record["name"]:
                place = {key: record.pop(key) for key in ("shard", "offsets")}
                record |= {"alias_of": original, **place}
            found.append(record)
        return found

    def forms_at(self, position: int) -> dict[int, RecordForm]:
        """The records of the step at a position by the number of their array, in order. Raises ReadError."""
        return self._record_forms.of(self._columns["plan"][position], self._columns["extents"][position])

    def _record(self, form: RecordForm, occurrence: int, row: int, directory: str) -> Json:
        place = form.place
        begin = place.begin + (0 if place.constant else row * place.row_bytes)
        record = form.content.copy()
        record["name"] = f"{directory}/{form.tail}"
        record["shape"] = list(form.shape)
        record["hash"] = f"{HASH_PREFIX}{self.places.hash(form.array, occurrence)}"
        record["shard"] = form.shard
        record["offsets"] = [begin, begin + form.nbytes]
        return record

    def _firsts(self, position: int) -> dict[int, tuple[int, int]]:
        """How often each array occurred before a step, and with how many rows in all."""
        # Steps are mostly read in order: then only those since the last one are counted.
        last, known = self._counted
        if position < last:
            last, known = 0, {}
        found = dict(known)
        for plan_number, extents_number, count in self._groups(last, position):
            plan, extents = self.plan(plan_number), self._extents(extents_number)
            for array, group in zip(plan.arrays, plan.groups, strict=True):
                if group >= len(extents):
                    raise self.damaged(f"there is no extent {group}")
                times, rows = found.get(array, (0, 0))
                found[array] = times + count, rows + count * extents[group]
        self._counted = position, found
        return found

    def _groups(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Plan and extents of a range of steps, and how many of them have the same."""
        pairs = zip(self._columns["plan"][begin:end], self._columns["extents"][begin:end], strict=True)
        counted: dict[tuple[Any, Any], int] = {}
        for pair in pairs:
            if not all(type(each) is int for each in pair):
                raise self.damaged("a step has no plan")
            counted[pair] = counted.get(pair, 0) + 1
        # The sums are the same in any order.
        yield from ((plan, extents, count) for (plan, extents), count in counted.items())

    def plan(self, number: Any) -> Plan:
        """A plan of the index. Raises ReadError."""
        return self._plans.of(number)

    def _extents(self, number: Any) -> list[int]:
        return self._plans.extents(number)

    def entries(self, table: str) -> Sequence[Any]:
        """One of the index's tables, whatever is in it."""
        found: list[Any] = self._document[table]
        return found

    def _number(self, value: Any, most: int = LARGEST) -> int:
        return number_of(value, self.damaged, most)

    def _numbers(self, values: Any, most: int) -> list[int]:
        return numbers_of(values, self.damaged, most)
