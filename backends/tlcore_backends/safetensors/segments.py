"""A segment while it is filled: many steps of one rank, then put together as arrays and one index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tlcore.errors import BackendError
from tlcore.layout.hashes import HASH_BYTES
from tlcore.ledger import Counts
from tlcore.protocols import Buffer, Lease
from tlcore.record import Record, StepSummary
from tlcore.storage import SupportsAppend

from .blocks import Block
from .columns import Column, columns_of, lay_out
from .data_file import DataFile
from .index_text import IndexText
from .kept_memory import KeptMemory, columns_of_kept
from .plans import OpenStep, Plan, Plans
from .sealed import File, Sealed, put_together
from .segment_names import LONGEST_STEPS, MOST_STEPS, data_name, index_name, steps_text
from .shard_buffer import ShardBuffer, ShardBuffers
from .step_files import StepFiles, Tensor, Unread
from .stored_plans import MOST_ITEMS

MOST_ARRAYS = 50_000
_MOST_HEADER_BYTES = 16 << 20
# Of an array's entry in a header, beside its name.
_ENTRY_BYTES = 120
_NAME_CHECKED = 16
Fill = Callable[[memoryview], bool]
# Whether a column's bytes are to be written from where they lie.
Apart = Callable[[Column], bool]


class _Step(NamedTuple):
    number: int
    begin: int
    plan: Plan
    hashes: bytes
    kept: Mapping[int, np.ndarray] | None = None


class Segment:
    """Segment ``number`` of a rank while it is filled.

    ``plans`` and ``memory`` outlive it. The steps' bytes lie one after the other in memory as they came,
    each tensor's rows are brought together when the segment is sealed, where it is ``apart`` only when it is
    written.
    """

    def __init__(
        self, rank: int, number: int, plans: Plans, memory: ShardBuffers, apart: Apart = lambda column: False
    ) -> None:
        self._apart = apart
        self.rank = rank
        self.number = number
        self.full = False
        self._plans = plans
        self._memory = memory
        self._gathered: ShardBuffer | None = None
        self._open: OpenStep | None = None
        self._steps: list[_Step] = []
        self._told = IndexText()
        self._checked = _NAME_CHECKED
        # Of steps that have ended.
        self._kept = KeptMemory()
        # Of a step larger than a segment: the files that hold its first tensors, and where each of them lies.
        self._files: list[DataFile] = []
        self._columns: dict[int, Column] = {}
        self._taken: dict[object, int] = {}
        self._filed = 0
        self._streamed: StepFiles | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in memory, those of the open step included."""
        open_kept = self._open.kept_bytes if self._open is not None else 0
        return self.copied_bytes + self._kept.nbytes + open_kept

    @property
    def copied_bytes(self) -> int:
        """Those that are not in memory which is kept."""
        streamed = self._streamed.nbytes if self._streamed is not None else 0
        return streamed + (self._gathered.nbytes if self._gathered is not None else 0)

    @property
    def open_bytes(self) -> int:
        """Those of the open step alone."""
        step = self._open
        return self.copied_bytes - step.begin + step.kept_bytes if step is not None else 0

    @property
    def is_empty(self) -> bool:
        """Whether it has no step that has ended."""
        return not self._steps

    @property
    def open_arrays(self) -> int:
        """How many tensors of the open step are in memory."""
        return len(self._open.slots) - self._filed if self._open is not None else 0

    def write(self, batch: Sequence[Record], lease: Lease | None = None) -> bool:
        """Copy records of the open step, which begins with the first of them.

        Where the step began with a ``lease``, its memory is kept until its file is stored instead: True.
        """
        step = self._open
        if step is None:
            step = self._open = OpenStep(batch[0].step, self._plans.last, self.copied_bytes)
        first = len(step.slots)
        parts = step.add(batch, self._plans.describer)
        if step.kept is not None or (lease is not None and not first):
            step.keep(first, parts, lease)
            return lease is not None
        if self._streamed is not None:
            self._stream([record.data for record in batch])
            return False
        if self._gathered is None:
            self._gathered = self._memory.take()
        self._gathered.extend(parts)
        return False

    def stream(self, store: SupportsAppend, most_bytes: int, published: Callable[[str, int], None]) -> None:
        """Have the open step, and no other, written into files of about ``most_bytes`` while it comes.

        ``published`` is told each file. Raises BackendError. Only for a segment without other steps.
        """
        if self._steps or self._files:
            raise BackendError("only a step that has a segment of its own is written while it comes")
        name_of = partial(data_name, self.rank, self.number)
        self._streamed = StepFiles(store, name_of, most_bytes, published, self._taken)
        step, gathered = self._open, self._gathered
        if step is None or gathered is None:
            return
        with gathered.view() as whole:
            offsets = Plan(step.slots, step.originals, (), ()).offsets
            begins = (step.begin + offset for offset in offsets)
            slots = zip(begins, step.slots, strict=True)
            self._stream([whole[begin : begin + slot.nbytes] for begin, slot in slots])
        self._gathered = None
        self._memory.give(gathered)

    @property
    def is_streamed(self) -> bool:
        """Whether the open step is written while it comes."""
        return self._streamed is not None

    def write_unread(self, batch: Sequence[Record], data: Sequence[Unread]) -> None:
        """Write records, whose bytes ``data`` stands for, into the files of the open step."""
        step = self._open
        if step is None:
            step = self._open = OpenStep(batch[0].step, self._plans.last, self.copied_bytes)
        step.add(batch, self._plans.describer)
        self._stream(data)

    def _stream(self, data: Sequence[Buffer | Unread]) -> None:
        step, streamed = self._open, self._streamed
        assert step is not None and streamed is not None
        slots, digests = step.slots[self._filed :], step.digests[self._filed :]
        numbers = [self._told.arrays.number(slot.text) for slot in slots]
        streamed.write(map(Tensor, numbers, slots, digests, data))
        self._filed = len(step.slots)

    def _finish_stream(self) -> None:
        if self._streamed is not None:
            self._streamed.finish()
            self._columns, self._files = self._streamed.columns, self._streamed.files
            self._streamed = None

    def hand_over_step(self, other: Segment) -> None:
        """Let an empty segment go on with the open step."""
        step, self._open = self._open, None
        if step is None:
            return
        other._open = step
        if self._gathered is not None and step.kept is None:
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
        if self._open is not None:
            self._open.give_back()
        if not self._steps:
            self._kept.end(clean=False)
        if self._streamed is not None:
            self._streamed.abandon()
        self._open = None

    @property
    def has_files(self) -> bool:
        """Whether files hold tensors of the open step; without it they are no segment."""
        return bool(self._files) or self._streamed is not None

    def commit(self, summary: StepSummary) -> Plan:
        """End the open step (or one without tensors); its plan. After an error the step is forgotten."""
        step = self._open or OpenStep(summary.step, None, self.copied_bytes)
        try:
            self._finish_stream()
            plan = self._plans.plan(step, summary)
            self._told.add(plan, summary)
        except BaseException:
            self.abandon_step()
            raise
        self._open = None
        kept = self._kept.take(step)
        self._append(_Step(summary.step, step.begin, plan, step.hashes, kept))
        return plan

    def commit_alike(self, plan: Plan, summary: StepSummary, hashes: bytes, fill: Fill) -> bool:
        """Add a step of a plan at once; False, with nothing added, where ``fill`` says no."""
        begin = self.copied_bytes
        if self._gathered is None:
            self._gathered = self._memory.take()
        gathered = self._gathered
        gathered.skip(plan.nbytes)
        filled = False
        try:
            with gathered.view() as whole, whole[begin:] as memory:
                filled = fill(memory)
            if filled:
                self._told.add(plan, summary)
        except BaseException:
            filled = False
            raise
        finally:
            if not filled:
                gathered.nbytes = begin
        if filled:
            self._append(_Step(summary.step, begin, plan, hashes))
        return filled

    def _append(self, step: _Step) -> None:
        self._steps.append(step)
        self._look_whether_full()

    def _look_whether_full(self) -> None:
        if len(self._steps) >= self._checked:
            # Runs of steps mostly grow without their text growing; looking each time would be quadratic.
            self._checked += _NAME_CHECKED
            self.full |= len(steps_text(self.numbers)) > LONGEST_STEPS
        arrays = self._told.arrays
        header = len(arrays.texts) * _ENTRY_BYTES + arrays.nbytes
        self.full |= len(arrays.texts) >= MOST_ARRAYS or header >= _MOST_HEADER_BYTES
        self.full |= self._told.nbytes >= _MOST_HEADER_BYTES or bool(self._files)
        # Readers refuse what claims far more.
        self.full |= len(self._steps) >= MOST_STEPS or self._told.plan_items >= MOST_ITEMS // 4

    def file_open_step(self) -> File:
        """Put the tensors that are in memory of the open step into a file, which makes room for more.

        Only for a segment without other steps.
        """
        step = self._open
        if step is None or self._steps or (self._gathered is None and step.kept is None):
            raise BackendError("only a step that is larger than a segment is written in several files")
        plan = Plan(step.slots, step.originals, (), ())
        numbers = [self._told.arrays.number(slot.text) for slot in plan.slots]
        columns = self._columns_of_step(plan, step, numbers)
        if step.kept is not None:
            self._kept.take(step)
            step.kept = {}
        file = self._make_file(columns)
        self._filed = len(step.slots)
        return file

    def _columns_of_step(self, plan: Plan, step: OpenStep, numbers: Sequence[int]) -> dict[int, Column]:
        """Columns of what a step has in memory: its slots from `_filed` on."""
        first, hashes = self._filed, step.hashes
        if step.kept is not None:
            return columns_of_kept(plan, first, step.kept, numbers, hashes)
        # What an alias shares may lie in an earlier file; then its own array is never copied.
        filed = sum(
            slot.nbytes
            for position, slot in enumerate(plan.slots[:first])
            if plan.originals[position] == position
        )
        slots, shift = plan.slots[first:], step.begin - filed
        places = [offset + shift for offset in plan.offsets[first:]]
        block = Block.of_slots(slots, [self._bytes()] * len(slots), places, hashes[first * HASH_BYTES :])
        return columns_of(block, slots, numbers[first:])

    def _bytes(self) -> np.ndarray:
        if self._gathered is None or not self._gathered.nbytes:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._gathered.view(), np.uint8)

    def _make_file(self, columns: dict[int, Column]) -> File:
        """A file of these columns; the memory of the steps' bytes is free again, or with the file."""
        name = data_name(self.rank, self.number, len(self._files))
        head = lay_out(columns, self._taken, len(self._files))
        own = [column for column in columns.values() if column.same_as is None]
        own.sort(key=lambda column: column.begin)
        apart = [self._apart(column) for column in own]
        nbytes = len(head) + sum(column.stored_bytes for column in own)
        parts, memory = put_together(self._memory, head, own, apart)
        for column in columns.values():
            column.chunks = []
        self._columns |= columns
        self._files.append(DataFile.of(name, nbytes, head))
        gathered, self._gathered = self._gathered, None
        if gathered is not None and any(apart):
            memory.append(gathered)
        elif gathered is not None:
            self._memory.give(gathered)
        kept, self._kept = self._kept, KeptMemory()
        # Whether anybody reads the arrays is told by who has them.
        self._steps = [step._replace(kept=None) for step in self._steps]
        return File(name, parts, nbytes, memory, kept)

    def seal(self, ledger: Counts) -> Sealed:
        """Put the segment together; ``ledger`` is the rank's so far, these steps included."""
        self.abandon_step()
        try:
            columns = self._all_columns()
            file = self._make_file(columns) if columns else None
        finally:
            # That of a file is its own by now.
            self._kept.end(clean=False)
        numbers = [step.number for step in self._steps]
        text = self._told.text(self.rank, self.number, ledger, self._files, self._columns)
        name = index_name(self.rank, self.number, numbers)
        return Sealed(file, name, text, numbers, file.nbytes if file is not None else 0)

    def _all_columns(self) -> dict[int, Column]:
        if self._files:
            step = self._steps[0]
            if self._filed == len(step.plan.slots):
                return {}
            return self._rest_of_large_step(step)
        found: dict[int, Column] = {}
        for in_memory, steps in groupby(self._steps, key=_kind):
            if in_memory is None:
                for step in steps:
                    self._add_kept(found, step)
            else:
                self._add_steps(found, list(steps))
        return found

    def _rest_of_large_step(self, step: _Step) -> dict[int, Column]:
        again = OpenStep(step.number, None, step.begin)
        again.slots, again.originals = list(step.plan.slots), step.plan.originals
        again.digests = [step.hashes.hex()]
        again.kept = None if step.kept is None else dict(step.kept)
        return self._columns_of_step(step.plan, again, self._told.arrays_of(step.plan))

    def _add_kept(self, found: dict[int, Column], step: _Step) -> None:
        numbers = self._told.arrays_of(step.plan)
        _add(found, columns_of_kept(step.plan, 0, step.kept or {}, numbers, step.hashes))

    def _add_steps(self, found: dict[int, Column], steps: Sequence[_Step]) -> None:
        """Add steps whose plans have the same base."""
        plan = steps[0].plan
        if plan.slots:
            _, begins, plans, hashes, _ = zip(*steps, strict=True)
            block = Block.of_steps(self._bytes(), begins, plans, hashes)
            _add(found, columns_of(block, plan.slots, self._told.arrays_of(plan)))


def _kind(step: _Step) -> int | None:
    """Equal for steps that are alike but for rows; None for one whose memory is kept."""
    return id(step.plan.base) if step.kept is None else None


def _add(found: dict[int, Column], more: Mapping[int, Column]) -> None:
    for number, column in more.items():
        known = found.setdefault(number, column)
        if known is not column:
            known.chunks += column.chunks
