"""From staged batches to a sink: naming, hashing, duplicates, the ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from ...hotpath.hashing import hex_digests
from ...layout import names
from ...layout.templates import Structures
from ...layout.times import time_text
from ...ledger import RUN_FULL, Ledger
from ...protocols import Sink, SupportsLateCommit, SupportsLentMemory
from ...record import Json, Record, StepSummary
from ..batch import Batch, StepEnd
from ..filters.kept_rows import WaitingSpec
from ..filters.run_bytes import RunBytes
from ..staging.host_memory import Chunk, HostPool
from .booking import Booking
from .channels import Channels
from .describing import count_specs
from .inspector import Inspected, Inspection, Inspector
from .open_step import OpenStep
from .planner import Plan, Planned, Planner
from .repeating import Look, Repeats

log = logging.getLogger("tlcore")
# Records made at a time: few enough that Python's garbage collector sees them come and go.
_AT_ONCE = 256
# From so many bytes a tensor on, on average, it is worth to lend memory instead of having it copied.
_LARGE_BYTES = 1 << 20


class Processor:
    """Turns batches into sink calls, one step after the other; used by one thread at a time.

    ``catches`` is what may come out of a sink and is booked. In the model's thread Ctrl-C is no fault of the
    sink's; on a thread of our own there is nobody else whom it could tell.
    """

    catches: type[BaseException] = Exception

    def __init__(
        self,
        sink: Sink,
        pool: HostPool,
        ledger: Ledger,
        rank: int,
        examination: Inspection | None = None,
        end_run: Callable[[bool], None] = lambda whole: None,
        channels: Channels | None = None,
        room: RunBytes | None = None,
    ) -> None:
        needed = examination is not None and examination.needed
        self._inspector: Inspector | Channels | None = channels
        if examination is not None and needed:
            self._inspector = Inspector(examination)
        self._channels = channels
        self._room = room
        self._sink = sink
        self._end_run = end_run
        self._pool = pool
        self._booking = Booking(ledger)
        self._late = sink if isinstance(sink, SupportsLateCommit) else None
        if self._late is not None:
            self._late.tell_stored(self._booking.decide)
        self._rank = rank
        self._plans = Planner(rank)
        self._repeats = Repeats(sink)
        self._lent = sink if isinstance(sink, SupportsLentMemory) and sink.keeps_memory else None
        self._steps: dict[int, OpenStep] = {}

    @property
    def first_error(self) -> BaseException | None:
        """Why a step could not be stored for the first time."""
        return self._booking.first_error

    @property
    def failing(self) -> BaseException | None:
        """Why the last step failed; None once a step's tensors are stored again."""
        return self._booking.failing

    def batch(self, batch: Batch, give_up: bool = False) -> None:
        """Name, hash and write a batch, then give its memory back; ``give_up`` fails its step untried."""
        for earlier in self._steps.values():
            # Its end should have come: whatever keeps it, the model must not run out of memory.
            earlier.whole |= earlier.undecided is not None
            self._take_undecided(earlier)
            self._write_waiting(earlier)
        step = self._steps.setdefault(batch.step, OpenStep())
        if give_up:
            step.error = step.error or self.failing
        if batch.waits and batch.is_whole_step and step.error is None:
            step.undecided = batch
            return
        # The memory is needed before the sampler has run.
        step.whole = step.whole or batch.waits
        self._take(batch, step)

    def _take(self, batch: Batch, step: OpenStep) -> None:
        try:
            self._store(batch, step)
        except self.catches as error:
            step.error = step.error or error
        finally:
            if step.waiting is None:
                self._release(batch)

    def _write_waiting(self, step: OpenStep, look: Look | None = None) -> None:
        """Write what waits for a step's end as any other batch, if anything does; ``look`` is of it."""
        if step.waiting is None:
            return
        (batch, plan), step.waiting = step.waiting, None
        try:
            if step.error is None:
                self._write_planned(batch, step, plan, look)
        except self.catches as error:
            step.error = step.error or error
        finally:
            self._release(batch)

    def _release(self, batch: Batch) -> None:
        for chunk in batch.memory:
            self._pool.release(chunk)

    def _store(self, batch: Batch, step: OpenStep) -> None:
        try:
            for chunk in batch.memory:
                chunk.ready()
        except Exception as error:
            # A device failed; the batch is still booked, as captured and failed.
            step.error = step.error or error
        if batch.waits:
            _gather(batch, self._room)
        examined = self._examine(batch, step)
        self._store_examined(batch if examined is None else examined.batch, step, examined)

    def _examine(self, batch: Batch, step: OpenStep) -> Inspected | None:
        # Of a step that has failed nothing is stored, so nothing need be looked at.
        if self._inspector is None or step.error is not None:
            return None
        try:
            return self._inspector.examine(batch)
        except Exception as error:
            # The batch is still booked, as captured and failed.
            step.error = error
            return None

    def _store_examined(self, batch: Batch, step: OpenStep, examined: Inspected | None) -> None:
        try:
            plan = self._plans.plan(batch.sides, batch.specs, batch.scalars)
        except Exception:
            step.counts.add(count_specs(batch.specs))
            raise
        step.add(plan, examined)
        repeats = self._inspector is None and step.error is None and not self._may_lend(plan)
        if repeats and self._repeats.may_repeat(batch, plan):
            step.waiting = batch, plan
        else:
            self._write_planned(batch, step, plan)

    def _write_planned(self, batch: Batch, step: OpenStep, plan: Plan, look: Look | None = None) -> None:
        stored = plan.texts.stored
        for first in range(0, len(stored), _AT_ONCE):
            if step.error is not None:
                break
            some = stored[first : first + _AT_ONCE]
            digests = None if look is None else look.digests(first, len(some))
            chunks = [batch.chunks[each.place] for each in some] if self._may_lend(plan) else ()
            self._write(step, self._records(batch, step, some, digests), chunks)

    def _may_lend(self, plan: Plan) -> bool:
        """Whether the sink may keep the memory of a plan's tensors, which are large."""
        if self._lent is None or self._inspector is not None:
            return False
        return plan.nbytes >= _LARGE_BYTES * max(1, len(plan))

    def _records(
        self, batch: Batch, step: OpenStep, stored: Sequence[Planned], digests: list[str] | None
    ) -> list[Record]:
        number, chunks, offsets = batch.step, batch.chunks, batch.offsets
        directory = names.step_dir(number)
        made = []
        views = [
            chunks[place].view[offsets[place] : offsets[place] + nbytes] for place, _, _, _, nbytes in stored
        ]
        digests = hex_digests(views) if digests is None else digests
        for (_, tail, origin, kind, _), data, digest in zip(stored, views, digests, strict=True):
            name = directory + tail
            first = step.first.setdefault((digest, kind), name)
            made.append(Record(name, number, origin, data, digest, None if first is name else first))
        return made

    def _write(self, step: OpenStep, records: Sequence[Record], lent: Sequence[Chunk] = ()) -> None:
        try:
            if lent:
                self._write_lent(records, lent)
            else:
                self._sink.write(records)
        except self.catches as error:
            # The rest of the batch is still booked, as captured and failed.
            step.error = error
            return
        step.written += len(records)
        step.bytes_written += sum(record.data.nbytes for record in records if record.alias_of is None)

    def _write_lent(self, records: Sequence[Record], chunks: Sequence[Chunk]) -> None:
        nbytes = sum(record.data.nbytes for record in records if record.alias_of is None)
        lease = self._pool.lend({id(chunk): chunk for chunk in chunks}.values(), nbytes)
        if lease is None or self._lent is None:
            self._sink.write(records)
            return
        kept = False
        try:
            kept = self._lent.write_lent(records, lease)
        finally:
            if not kept:
                lease.end()

    def end_step(self, end: StepEnd, give_up: bool = False) -> None:
        """Commit the step and book its ledger; a step that cannot be committed counts as failed."""
        step = self._steps.pop(end.step, None) or OpenStep()
        step.counts.add(end.unopened)
        if give_up:
            step.error = step.error or self.failing
        if step.undecided is not None or end.undecided:
            self._settle(step, end)
        if self._inspector is not None:
            try:
                rest = self._inspector.rest(end.step)
                self._store_examined(rest.batch, step, rest)
            except self.catches as error:
                step.error = step.error or error
        if step.waiting is None:
            self._commit(end, step)
        else:
            self._end_waiting(end, step, *step.waiting)

    def _commit(self, end: StepEnd, step: OpenStep) -> bool:
        """Commit and book a step whose tensors are written; whether the sink has accepted it."""
        counts, accepted = step.counts, False
        if step.error is None:
            counts.stored, counts.bytes_stored = step.written, step.bytes_written
            if self._late is not None:
                # It may be told as stored before it is said to be accepted.
                self._booking.accept(end.step, counts)
                accepted = True
            try:
                directory = names.step_dir(end.step)
                structures = Structures(directory, step.templates, step.values)
                self._sink.commit_step(self._summary(end, step, structures))
            except self.catches as error:
                step.error = error
        if self._channels is not None:
            self._commit_channels(self._channels, end.step, whole=step.error is None)
        if not accepted:
            self._booking.book(end.step, counts, step.error)
        elif step.error is not None:
            self._booking.decide(end.step, step.error)
        return step.error is None

    def _end_waiting(self, end: StepEnd, step: OpenStep, batch: Batch, plan: Plan) -> None:
        """Write and commit a step that may be like one before: at once, or else as any other."""
        look = None
        try:
            if step.error is None:
                look = self._repeats.look(batch, plan)
            if look is not None and self._repeated(end, step, look):
                step.waiting = None
                self._release(batch)
                return
        except self.catches as error:
            step.error = step.error or error
        self._write_waiting(step, look)
        if self._commit(end, step) and look is not None:
            self._repeats.learn(look, end.step)

    def _repeated(self, end: StepEnd, step: OpenStep, look: Look) -> bool:
        """Whether the sink has taken the step as one like another, or has failed with it."""
        if not self._repeats.knows(look):
            return False
        counts = step.counts
        summary = self._summary(end, step, {})
        counts.stored, counts.bytes_stored = len(look.seen.plan), look.nbytes
        self._booking.accept(end.step, counts)
        try:
            if self._repeats.write(look, summary):
                return True
        except self.catches as error:
            self._booking.decide(end.step, error)
            return True
        self._booking.withdraw(end.step)
        return False

    def _settle(self, step: OpenStep, end: StepEnd) -> None:
        """Store what has waited for it to be decided which drafts stay, without the rows of the others."""
        try:
            if step.error is None and not step.whole:
                end.settle()
                for rows in end.undecided:
                    rows.settle()
        except self.catches as error:
            step.error = error
        self._take_undecided(step)

    def _take_undecided(self, step: OpenStep) -> None:
        batch, step.undecided = step.undecided, None
        if batch is not None:
            self._take(batch, step)

    def _commit_channels(self, channels: Channels, step: int, whole: bool) -> None:
        if not whole:
            channels.discard(step)
            return
        try:
            channels.commit(step)
        except self.catches as error:
            # They stay in memory, and are tried again.
            log.warning("the channel statistics could not be stored yet: %s", error)

    def _summary(self, end: StepEnd, step: OpenStep, structures: Mapping[str, Json]) -> StepSummary:
        end.settle()
        return StepSummary(
            step=end.step,
            rank=self._rank,
            # Of a call that only taps tell of, each of them tells.
            calls=list(dict.fromkeys(step.calls)),
            structures=structures,
            counts=step.counts,
            started=time_text(end.started),
            ended=time_text(end.ended),
            rows=end.rows,
            extra=end.extra,
        )

    def flush(self) -> None:
        """Return when every step that ended is stored or booked as failed."""
        saves: list[Callable[[], object]] = []
        if self._channels is not None:
            saves.append(self._channels.save)
        if self._late is not None:
            saves.append(self._late.flush)
        for save in saves:
            # What one place refuses is no reason to leave the other.
            try:
                save()
            except self.catches as error:
                log.warning("what was captured could not be flushed: %s", error)

    def close(self) -> None:
        """Close the sink, then end the run; steps still open count as failed."""
        for number, step in sorted(self._steps.items()):
            step.error = step.error or RuntimeError("the step never ended")
            self.end_step(StepEnd(number, 0, 0, None, {}))
        whole = self._channels is None or self._closed(self._channels.save)
        whole = self._closed(self._sink.close) and whole
        # What the sink never decided is booked before the run's end tells the ledger.
        self._booking.close()
        self._closed(lambda: self._end_run(whole))

    def _closed(self, close: Callable[[], None]) -> bool:
        try:
            close()
        except self.catches as error:
            self._booking.first_error = self._booking.first_error or error
            log.warning("the run could not be closed: %s", error)
            return False
        return True


def _gather(batch: Batch, room: RunBytes | None) -> None:
    """Take the rows that do not stay out of a batch's tensors, where that is decided."""
    for place, spec in enumerate(batch.specs):
        if isinstance(spec, WaitingSpec):
            address = batch.chunks[place].address + batch.offsets[place]
            found = spec.rows.gather(address, spec.whole)
            fits = room is None or room.take(found.nbytes)
            batch.specs[place] = found if fits else found.refused(RUN_FULL)
