"""An index while its segment is filled: what steps have in common once, and of each step what is its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tlcore.layout.checksums import with_checksum
from tlcore.layout.names import step_dir
from tlcore.layout.templates import Structures, compact, structures_of
from tlcore.ledger import Counts
from tlcore.record import Json, StepSummary

from .alike_objects import Details, RowLists
from .columns import Column
from .compact import Changing, Table, microseconds, runs
from .data_file import DataFile
from .plans import Common, Plan

# What the index says of each step.
PER_STEP = ("number", "plan", "extents", "started", "took", "details", "change", "rows", "values")


class IndexText:
    """The tables and columns of an index; ``arrays`` are the captured tensors by number.

    ``plan_items`` counts what a reader must hold of the plans.
    """

    def __init__(self) -> None:
        self.arrays = Table()
        self.plan_items = 0
        self._numbers: dict[int, tuple[int, list[int]]] = {}
        self._bound: list[Plan] = []
        self._common: dict[int, tuple[list[int], str]] = {}
        self._calls, self._structures = Table(), Table()
        self._plan_table, self._extents = Table(), Table()
        self._skeletons, self._deltas, self._row_lists = Table(), Table(), Table()
        self._details = Changing(self._skeletons, self._deltas)
        self._split_details = Details().split
        self._rows = RowLists(self._skeletons, self._deltas, self._row_lists)
        self._per_step: dict[str, list[str]] = {name: [] for name in PER_STEP}
        self._values_bytes = 0
        self._started = 0

    @property
    def nbytes(self) -> int:
        """Bytes of what can grow with the steps, but for their own few numbers."""
        tables = (self._structures, self._plan_table, self._skeletons, self._deltas, self._row_lists)
        return sum(table.nbytes for table in tables) + self._values_bytes

    def arrays_of(self, plan: Plan) -> Sequence[int]:
        """The numbers of a plan's arrays, one for each slot; of a plan that a step had."""
        return self._numbers[id(plan)][1]

    def add(self, plan: Plan, summary: StepSummary) -> None:
        """Note a step that has ended. After an error nothing of it is there."""
        own = self._own(plan, summary)
        for key, value in own.items():
            self._per_step[key].append(str(value))
        self._values_bytes += len(own["values"])

    def _bind(self, plan: Plan) -> int:
        """The number of a plan in the index; all that it refers to gets numbers as well."""
        known = self._numbers.get(id(plan))
        if known is not None:
            return known[0]
        arrays, begin = self._common_of(plan.base)
        number = self._plan_table.number(f'{begin},"extents":{compact(plan.groups)}}}')
        self.plan_items += len(plan.calls) + len(plan.structures) + 2 * len(plan.slots)
        self._numbers[id(plan)] = number, arrays
        # As long as it lives no other can get its id.
        self._bound.append(plan)
        return number

    def _common_of(self, base: Plan) -> tuple[list[int], str]:
        """The numbers of a plan's arrays, and its text up to what changes with the rows."""
        found = self._common.get(id(base))
        if found is not None:
            return found
        is_first = not (self.arrays.texts or self._calls.texts or self._structures.texts)
        if is_first and base.common is not None:
            # Most segments have one plan, and to number all of it takes as long as to lay out its arrays.
            arrays, text, tables = base.common
            self.arrays, self._calls, self._structures = (table.copy() for table in tables)
        else:
            arrays, text = self._numbered(base)
        if is_first and base.common is None:
            tables = self.arrays.copy(), self._calls.copy(), self._structures.copy()
            base.common = Common(arrays, text, tables)
        self._common[id(base)] = arrays, text
        return arrays, text

    def _numbered(self, base: Plan) -> tuple[list[int], str]:
        arrays = list(map(self.arrays.number, (slot.text for slot in base.slots)))
        told = {
            "calls": runs(map(self._calls.number, map(compact, base.calls))),
            "structures": runs(map(self._structures.number, base.structures)),
            "arrays": runs(arrays),
        }
        return arrays, compact(told)[:-1]

    def _own(self, plan: Plan, summary: StepSummary) -> dict[str, str]:
        """What the index says of a step by itself, as JSON texts."""
        started, ended = microseconds(summary.started), microseconds(summary.ended)
        details: Json = {"ledger": summary.counts.to_json(), "extra": dict(summary.extra)}
        if started is None or ended is None:
            details |= {"started": summary.started, "ended": summary.ended}
        # All that may be refused comes before anything is noted.
        told = self._split_details(details)
        if summary.rows is not None:
            self._rows.take(summary.rows)
        values = _values(structures_of(step_dir(summary.step), summary.structures))
        number = self._bind(plan)
        skeleton, change = self._details.told(*told)
        times = ("null", "null")
        if started is not None and ended is not None:
            times = str(started - self._started), str(ended - started)
            self._started = started
        row_list = "null" if summary.rows is None else str(self._rows.told())
        return {
            "number": str(summary.step),
            "plan": str(number),
            "extents": str(self._extents.number(compact(plan.extents))),
            "started": times[0],
            "took": times[1],
            "details": str(skeleton),
            "change": str(change),
            "rows": row_list,
            "values": values,
        }

    def text(
        self,
        rank: int,
        segment: int,
        ledger: Counts,
        files: Iterable[DataFile],
        columns: Mapping[int, Column],
    ) -> bytes:
        """The index: ``ledger`` is the rank's so far, ``columns`` say where each array lies."""
        for number, column in columns.items():
            self.arrays.texts[number] = column.entry()
        told = {
            "layout": "2",
            "rank": str(rank),
            "segment": str(segment),
            "ledger": compact(ledger.to_json()),
            "files": compact([file.to_json() for file in files]),
            "calls": self._calls.text(),
            "structures": self._structures.text(),
            "arrays": self.arrays.text(),
            "plans": self._plan_table.text(),
            "extents": self._extents.text(),
            "skeletons": self._skeletons.text(),
            "changes": self._deltas.text(),
            "rows": self._row_lists.text(),
        }
        told_columns = {
            key: f"[{','.join(values)}]"
            for key, values in self._per_step.items()
            if key not in ("rows", "values") or any(value != "null" for value in values)
        }
        told["steps"] = "{" + ",".join(f'"{key}":{value}' for key, value in told_columns.items()) + "}"
        return with_checksum("{" + ",\n".join(f'"{key}":{value}' for key, value in told.items()) + "}\n")


def _values(structures: Structures) -> str:
    """The values that a step's structures leave open, in their order, as a JSON array; ``null`` for none."""
    values = structures.values_in_order
    return f"[{','.join(values)}]" if values else "null"
