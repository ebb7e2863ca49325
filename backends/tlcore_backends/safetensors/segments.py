"""A segment while it is filled: many steps of one rank, then put together as arrays and one index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tlcore.errors import BackendError
from tlcore.layout.names import step_dir
from tlcore.layout.templates import Structures, compact, structures_of
from tlcore.ledger import Counts
from tlcore.protocols import Buffer
from tlcore.record import Json, Record, StepSummary

from .columns import Chunk, Column, lay_out
from .compact import Changing, Splitter, Table, listed, microseconds, repeats, runs, split
from .plans import OpenStep, Plan, Plans, hash_table
from .segment_names import LONGEST_STEPS, MOST_STEPS, data_name, index_name, steps_text
from .shard_buffer import ShardBuffer, ShardBuffers
from .stored_plans import MOST_ITEMS

MOST_ARRAYS = 50_000
_MOST_HEADER_BYTES = 16 << 20
# Of an array's entry in a header, beside its name.
_ENTRY_BYTES = 120
_NAME_CHECKED = 16


class File(NamedTuple):
    """A data file that is put together: its name, its bytes, and the memory to give back after them."""

    name: str
    parts: Sequence[Buffer]
    nbytes: int
    memory: ShardBuffer | None


class Sealed(NamedTuple):
    """A segment that is complete: its data file, its index's name and text, and the steps that it commits.

    ``nbytes`` is the size of ``file``.
    """

    file: File | None
    index_name: str
    text: bytes
    steps: Sequence[int]
    nbytes: int


class _Step(NamedTuple):
    number: int
    begin: int
    plan: Plan
    hashes: bytes


class Segment:
    """Segment ``number`` of a rank while it is filled.

    ``plans`` and ``memory`` outlive it. The steps' bytes lie one after the other in memory as they came,
    each tensor's rows are brought together when the segment is sealed.
    """

    def __init__(self, rank: int, number: int, plans: Plans, memory: ShardBuffers) -> None:
        self.rank = rank
        self.number = number
        self.full = False
        self._plans = plans
        self._memory = memory
        self._gathered: ShardBuffer | None = None
        self._open: OpenStep | None = None
        self._steps: list[_Step] = []
        self._numbers: dict[int, tuple[int, list[int]]] = {}
        self._bound: list[Plan] = []
        self._plan_items = 0
        self._calls, self._structures, self._arrays = Table(), Table(), Table()
        self._plan_table, self._extents = Table(), Table()
        self._skeletons, self._deltas, self._row_lists = Table(), Table(), Table()
        self._details = Changing(self._skeletons, self._deltas)
        self._rows = Changing(self._skeletons, self._deltas)
        self._splitter = Splitter()
        self._per_step: dict[str, list[str]] = {name: [] for name in PER_STEP}
        self._values_bytes = 0
        self._started = 0
        self._checked = _NAME_CHECKED
        # Of a step larger than a segment: the files that hold its first tensors, and where each of them lies.
        self._files: list[tuple[str, int]] = []
        self._columns: dict[int, Column] = {}
        self._taken: dict[object, int] = {}
        self._filed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in memory, those of the open step included."""
        return self._gathered.nbytes if self._gathered is not None else 0

    @property
    def is_empty(self) -> bool:
        """Whether it has no step that has ended."""
        return not self._steps

    @property
    def open_arrays(self) -> int:
        """How many tensors of the open step are in memory."""
        return len(self._open.slots) - self._filed if self._open is not None else 0

    def write(self, batch: Sequence[Record]) -> None:
        """Copy records of the open step, which begins with the first of them."""
        step = self._open
        if step is None:
            step = self._open = OpenStep(batch[0].step, self._plans.last, self.nbytes)
        parts = step.add(batch, self._plans.describer)
        if self._gathered is None:
            self._gathered = self._memory.take()
        self._gathered.extend(parts)

    def hand_over_step(self, other: Segment) -> None:
        """Let an empty segment go on with the open step."""
        step, self._open = self._open, None
        if step is None:
            return
        other._open = step
        if self._gathered is not None:
            other._gathered = self._memory.take()
            with self._gathered.view() as whole, whole[step.begin :] as part:
                other._gathered.extend([part])
            self._gathered.nbytes = step.begin
        step.begin = 0

    @property
    def numbers(self) -> list[int]:
        """The steps that have ended."""
        return [step.number for step in self._steps]

    def abandon_step(self) -> None:
        """Forget the open step."""
        if self._open is not None and self._gathered is not None:
            self._gathered.nbytes = self._open.begin
        self._open = None

    @property
    def abandoned_files(self) -> list[str]:
        """Files that hold the first tensors of the open step."""
        return [name for name, _ in self._files]

    def commit(self, summary: StepSummary) -> None:
        """End the open step (or one without tensors). After an error the step is forgotten."""
        step = self._open or OpenStep(summary.step, None, self.nbytes)
        try:
            plan = self._plans.plan(step, summary)
            own = self._own(plan, summary)
        except BaseException:
            self.abandon_step()
            raise
        self._open = None
        self._steps.append(_Step(summary.step, step.begin, plan, step.hashes))
        for key, value in own.items():
            self._per_step[key].append(str(value))
        self._values_bytes += len(own["values"])
        self._look_whether_full()

    def _look_whether_full(self) -> None:
        if len(self._steps) >= self._checked:
            # Runs of steps mostly grow without their text growing; looking each time would be quadratic.
            self._checked += _NAME_CHECKED
            self.full |= len(steps_text(self.numbers)) > LONGEST_STEPS
        header = len(self._arrays.texts) * _ENTRY_BYTES + self._arrays.nbytes
        self.full |= len(self._arrays.texts) >= MOST_ARRAYS or header >= _MOST_HEADER_BYTES
        self.full |= self._tables_bytes >= _MOST_HEADER_BYTES or bool(self._files)
        # Readers refuse what claims far more.
        self.full |= len(self._steps) >= MOST_STEPS or self._plan_items >= MOST_ITEMS // 4

    @property
    def _tables_bytes(self) -> int:
        tables = (self._structures, self._plan_table, self._skeletons, self._deltas, self._row_lists)
        return sum(table.nbytes for table in tables) + self._values_bytes

    def _bind(self, plan: Plan) -> int:
        """The number of a plan in this segment; all that it refers to gets numbers as well."""
        known = self._numbers.get(id(plan))
        if known is not None:
            return known[0]
        arrays = list(map(self._arrays.number, (slot.text for slot in plan.slots)))
        extents: dict[int, int] = {}
        groups = [extents.setdefault(slot.rows, len(extents)) for slot in plan.slots]
        text = compact(
            {
                "calls": runs(map(self._calls.number, map(compact, plan.calls))),
                "structures": runs(map(self._structures.number, plan.structures)),
                "arrays": runs(arrays),
                "extents": repeats(groups),
            }
        )
        number = self._plan_table.number(text)
        self._plan_items += len(plan.calls) + len(plan.structures) + 2 * len(plan.slots)
        self._numbers[id(plan)] = number, arrays
        # As long as it lives no other can get its id.
        self._bound.append(plan)
        return number

    def _own(self, plan: Plan, summary: StepSummary) -> dict[str, str]:
        """What the index says of a step by itself, as JSON texts."""
        started, ended = microseconds(summary.started), microseconds(summary.ended)
        details: Json = {"ledger": summary.counts.to_json(), "extra": dict(summary.extra)}
        if started is None or ended is None:
            details |= {"started": summary.started, "ended": summary.ended}
        # All that may be refused comes before anything is noted.
        told = split(details)
        rows = None if summary.rows is None else list(map(self._splitter.split, summary.rows))
        values = _values(structures_of(step_dir(summary.step), summary.structures))
        number = self._bind(plan)
        skeleton, change = self._details.told(*told)
        times = ("null", "null")
        if started is not None and ended is not None:
            times = str(started - self._started), str(ended - started)
            self._started = started
        row_list = "null"
        if rows is not None:
            parts = [part for row in rows for part in self._rows.told(*row)]
            row_list = str(self._row_lists.number(listed(parts)))
        extents = dict.fromkeys(slot.rows for slot in plan.slots)
        return {
            "number": str(summary.step),
            "plan": str(number),
            "extents": str(self._extents.number(compact(list(extents)))),
            "started": times[0],
            "took": times[1],
            "details": str(skeleton),
            "change": str(change),
            "rows": row_list,
            "values": values,
        }

    def file_open_step(self) -> File:
        """Put the tensors that are in memory of the open step into a file, which makes room for more.

        Only for a segment without other steps.
        """
        step = self._open
        if step is None or self._steps or self._gathered is None:
            raise BackendError("only a step that is larger than a segment is written in several files")
        plan = Plan(step.slots, step.originals, (), ())
        numbers = [self._arrays.number(slot.text) for slot in plan.slots]
        file = self._make_file(self._columns_of_step(plan, step, numbers))
        self._filed = len(step.slots)
        return file

    def _columns_of_step(self, plan: Plan, step: OpenStep, numbers: Sequence[int]) -> dict[int, Column]:
        """Columns of what a step has in memory: its slots from `_filed` on."""
        hashes = hash_table([step.hashes], len(plan.slots))
        shift = sum(
            slot.nbytes
            for position, slot in enumerate(plan.slots[: self._filed])
            if plan.originals[position] == position
        )
        data = self._bytes(step.begin, step.begin + plan.nbytes - shift).reshape(1, -1)
        found: dict[int, Column] = {}
        for position in range(self._filed, len(plan.slots)):
            slot = plan.slots[position]
            column = found.setdefault(numbers[position], Column(slot))
            offset = plan.offsets[position] - shift
            # What an alias shares may lie in an earlier file; then its own array is never copied.
            column.chunks.append(Chunk(data, offset, slot.nbytes, hashes[:, position], slot.rows))
        return found

    def _bytes(self, begin: int, end: int) -> np.ndarray:
        if self._gathered is None:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._gathered.view(), np.uint8)[begin:end]

    def _make_file(self, columns: dict[int, Column]) -> File:
        """A file of these columns; the memory of the steps' bytes is free again."""
        name = data_name(self.rank, self.number, len(self._files))
        numbers = list(columns)
        head = lay_out(list(columns.values()), numbers, self._taken, len(self._files))
        own = [column for column in columns.values() if column.same_as is None]
        nbytes = len(head) + sum(column.stored_bytes for column in own)
        whole = self._memory.take()
        whole.skip(nbytes)
        target = np.frombuffer(whole.view(), np.uint8)
        target[: len(head)] = np.frombuffer(head, np.uint8)
        for column in own:
            column.copy_into(target[column.begin : column.begin + column.stored_bytes])
            column.chunks = [chunk._replace(steps=chunk.steps[:, :0]) for chunk in column.chunks]
        for column in columns.values():
            column.chunks = []
        del target
        self._columns |= columns
        self._files.append((name, nbytes))
        if self._gathered is not None:
            gathered, self._gathered = self._gathered, None
            self._memory.give(gathered)
        return File(name, [whole.view()], nbytes, whole)

    def seal(self, ledger: Counts) -> Sealed:
        """Put the segment together; ``ledger`` is the rank's so far, these steps included."""
        self.abandon_step()
        columns = self._all_columns()
        file = self._make_file(columns) if columns else None
        numbers = [step.number for step in self._steps]
        text = self._index_text(ledger)
        name = index_name(self.rank, self.number, numbers)
        return Sealed(file, name, text, numbers, file.nbytes if file is not None else 0)

    def _all_columns(self) -> dict[int, Column]:
        if self._files:
            step = self._steps[0]
            if self._filed == len(step.plan.slots):
                return {}
            return self._rest_of_large_step(step)
        found: dict[int, Column] = {}
        first = 0
        while first < len(self._steps):
            plan, begin = self._steps[first].plan, self._steps[first].begin
            last = first
            while (
                last < len(self._steps)
                and self._steps[last].plan is plan
                and self._steps[last].begin == begin + (last - first) * plan.nbytes
            ):
                last += 1
            self._add_run(found, self._steps[first:last])
            first = last
        return found

    def _rest_of_large_step(self, step: _Step) -> dict[int, Column]:
        again = OpenStep(step.number, None, step.begin)
        again.slots, again.originals = list(step.plan.slots), step.plan.originals
        again.digests = [step.hashes.hex()]
        return self._columns_of_step(step.plan, again, self._numbers[id(step.plan)][1])

    def _add_run(self, found: dict[int, Column], steps: Sequence[_Step]) -> None:
        """Add steps of one plan whose bytes lie one after the other."""
        plan, begin, count = steps[0].plan, steps[0].begin, len(steps)
        hashes = hash_table([step.hashes for step in steps], len(plan.slots))
        data = self._bytes(begin, begin + count * plan.nbytes).reshape(count, plan.nbytes)
        for position, number in enumerate(self._numbers[id(plan)][1]):
            slot = plan.slots[position]
            column = found.get(number)
            if column is None:
                column = found[number] = Column(slot)
            chunk = Chunk(data, plan.offsets[position], slot.nbytes, hashes[:, position], slot.rows)
            column.chunks.append(chunk)

    def _index_text(self, ledger: Counts) -> bytes:
        for number, column in self._columns.items():
            self._arrays.texts[number] = column.entry()
        files = [{"file": name, "bytes": nbytes} for name, nbytes in self._files]
        told = {
            "layout": "2",
            "rank": str(self.rank),
            "segment": str(self.number),
            "ledger": compact(ledger.to_json()),
            "files": compact(files),
            "calls": self._calls.text(),
            "structures": self._structures.text(),
            "arrays": self._arrays.text(),
            "plans": self._plan_table.text(),
            "extents": self._extents.text(),
            "skeletons": self._skeletons.text(),
            "changes": self._deltas.text(),
            "rows": self._row_lists.text(),
        }
        columns = {
            key: f"[{','.join(values)}]"
            for key, values in self._per_step.items()
            if key not in ("rows", "values") or any(value != "null" for value in values)
        }
        told["steps"] = "{" + ",".join(f'"{key}":{value}' for key, value in columns.items()) + "}"
        return ("{" + ",\n".join(f'"{key}":{value}' for key, value in told.items()) + "}\n").encode("ascii")


# What the index says of each step.
PER_STEP = ("number", "plan", "extents", "started", "took", "details", "change", "rows", "values")


def _values(structures: Structures) -> str:
    """The values that a step's structures leave open, in their order, as a JSON array; ``null`` for none."""
    values = structures.values_in_order
    return f"[{','.join(values)}]" if values else "null"
