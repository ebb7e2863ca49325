"""From staged batches to a sink: naming, hashing, duplicates, the ledger; inline or in background."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from ...layout import names
from ...layout.templates import Structures, Templates
from ...protocols import Sink, SupportsLateCommit
from ...record import Counts, Ledger, Record, StepSummary
from ..batch import Batch, StepEnd
from ..calls import count_forms
from ..staging.host_memory import HostPool
from .booking import Booking
from .inspector import Inspected, Inspection, Inspector
from .planner import Plan, Planned, Planner, with_bare_last

log = logging.getLogger("tlcore")
# Records made at a time: few enough that Python's garbage collector sees them come and go.
_AT_ONCE = 256
# While every step fails, at most so many items wait, and a close goes on trying for so long.
_MOST_WAITING = 2000
_CLOSE_S = 60.0


@dataclass(slots=True)
class _OpenStep:
    """What the pipeline gathers of a step until it is committed.

    ``first`` has the name under which each kind of tensor with certain bytes was stored first. ``values``
    has what the templates leave open.
    """

    counts: Counts = field(default_factory=Counts)
    calls: list[str] = field(default_factory=list)
    templates: Templates = field(default_factory=Templates)
    bare: frozenset[str] = frozenset()
    values: dict[str, list[str]] = field(default_factory=dict)
    first: dict[tuple[str, int], str] = field(default_factory=dict)
    written: int = 0
    bytes_written: int = 0
    error: BaseException | None = None

    def add(self, plan: Plan, examined: Inspected | None) -> None:
        """Take over all that a batch's plan says."""
        self.counts.add(plan.counts)
        self.calls += plan.calls if examined is None else examined.calls
        if examined is not None:
            self.values.update(examined.values)
        # Most steps are one batch, whose texts are then joined only once.
        if not self.templates:
            self.templates, self.bare = plan.templates, plan.bare
        elif plan.templates:
            self.bare |= plan.bare
            self.templates = with_bare_last(Templates(self.templates | plan.templates), self.bare)


class Processor:
    """Turns batches into sink calls, one step after the other; used by one thread at a time.

    ``catches`` is what may come out of a sink and is booked. In the model's thread Ctrl-C is no fault of the
    sink's; on a thread of our own there is nobody else whom it could tell.
    """

    catches: type[BaseException] = Exception

    def __init__(
        self, sink: Sink, pool: HostPool, ledger: Ledger, rank: int, examination: Inspection | None = None
    ) -> None:
        needed = examination is not None and examination.needed
        self._inspector = Inspector(examination) if examination is not None and needed else None
        self._sink = sink
        self._pool = pool
        self._booking = Booking(ledger)
        self._late = sink if isinstance(sink, SupportsLateCommit) else None
        if self._late is not None:
            self._late.tell_stored(self._booking.decide)
        self._rank = rank
        self._plans = Planner(rank)
        self._steps: dict[int, _OpenStep] = {}

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
        step = self._steps.setdefault(batch.step, _OpenStep())
        if give_up:
            step.error = step.error or self.failing
        try:
            self._store(batch, step)
        except self.catches as error:
            step.error = step.error or error
        finally:
            for chunk in batch.memory:
                self._pool.release(chunk)

    def _store(self, batch: Batch, step: _OpenStep) -> None:
        try:
            for chunk in batch.memory:
                chunk.ready()
        except Exception as error:
            # A device failed; the batch is still booked, as captured and failed.
            step.error = step.error or error
        examined = self._examine(batch, step)
        self._store_examined(batch if examined is None else examined.batch, step, examined)

    def _examine(self, batch: Batch, step: _OpenStep) -> Inspected | None:
        # Of a step that has failed nothing is stored, so nothing need be looked at.
        if self._inspector is None or step.error is not None:
            return None
        try:
            return self._inspector.examine(batch)
        except Exception as error:
            # The batch is still booked, as captured and failed.
            step.error = error
            return None

    def _store_examined(self, batch: Batch, step: _OpenStep, examined: Inspected | None) -> None:
        try:
            plan = self._plans.plan(batch.sides, batch.specs, batch.scalars)
        except Exception:
            step.counts.add(count_forms(batch.specs))
            raise
        step.add(plan, examined)
        for first in range(0, len(plan.stored), _AT_ONCE):
            if step.error is not None:
                break
            self._write(step, self._records(batch, step, plan.stored[first : first + _AT_ONCE]))

    def _records(self, batch: Batch, step: _OpenStep, stored: Sequence[Planned]) -> list[Record]:
        number, chunks, offsets = batch.step, batch.chunks, batch.offsets
        directory = names.step_dir(number)
        made = []
        for place, tail, origin, kind, nbytes in stored:
            offset = offsets[place]
            data = chunks[place].view[offset : offset + nbytes]
            digest = xxhash.xxh3_128_hexdigest(data)
            name = directory + tail
            first = step.first.setdefault((digest, kind), name)
            made.append(Record(name, number, origin, data, digest, None if first is name else first))
        return made

    def _write(self, step: _OpenStep, records: Sequence[Record]) -> None:
        try:
            self._sink.write(records)
        except self.catches as error:
            # The rest of the batch is still booked, as captured and failed.
            step.error = error
            return
        step.written += len(records)
        step.bytes_written += sum(record.data.nbytes for record in records if record.alias_of is None)

    def end_step(self, end: StepEnd, give_up: bool = False) -> None:
        """Commit the step and book its ledger; a step that cannot be committed counts as failed."""
        step = self._steps.pop(end.step, None) or _OpenStep()
        if give_up:
            step.error = step.error or self.failing
        if self._inspector is not None:
            try:
                rest = self._inspector.rest(end.step)
                self._store_examined(rest.batch, step, rest)
            except self.catches as error:
                step.error = step.error or error
        counts, accepted = step.counts, False
        if step.error is None:
            counts.stored, counts.bytes_stored = step.written, step.bytes_written
            if self._late is not None:
                # It may be told as stored before it is said to be accepted.
                self._booking.accept(end.step, counts)
                accepted = True
            try:
                self._sink.commit_step(self._summary(end, step))
            except self.catches as error:
                step.error = error
        if not accepted:
            self._booking.book(end.step, counts, step.error)
        elif step.error is not None:
            self._booking.decide(end.step, step.error)

    def _summary(self, end: StepEnd, step: _OpenStep) -> StepSummary:
        end.settle()
        return StepSummary(
            step=end.step,
            rank=self._rank,
            calls=step.calls,
            structures=Structures(names.step_dir(end.step), step.templates, step.values),
            counts=step.counts,
            started=end.started,
            ended=end.ended,
            rows=end.rows,
            extra=end.extra,
        )

    def flush(self) -> None:
        """Return when every step that ended is stored or booked as failed."""
        if self._late is None:
            return
        try:
            self._late.flush()
        except self.catches as error:
            log.warning("what was captured could not be flushed: %s", error)

    def close(self) -> None:
        """Close the sink; steps still open count as failed."""
        for number, step in sorted(self._steps.items()):
            step.error = step.error or RuntimeError("the step never ended")
            self.end_step(StepEnd(number, "", "", None, {}))
        try:
            self._sink.close()
        except self.catches as error:
            self._booking.first_error = self._booking.first_error or error
            log.warning("the run could not be closed: %s", error)
        self._booking.close()


class InlineExecutor:
    """Runs the processor in the caller's thread: simple to debug, and the model waits."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def submit(self, item: Batch | StepEnd) -> None:
        """Process the item before returning."""
        if isinstance(item, Batch):
            self._processor.batch(item)
        else:
            self._processor.end_step(item)

    def flush(self) -> None:
        """Have the sink store what it has accepted."""
        self._processor.flush()

    settle = flush

    def close(self) -> None:
        """Close the processor."""
        self._processor.close()


class ThreadExecutor:
    """Runs the processor on one background thread; the order of items is kept."""

    def __init__(self, processor: Processor) -> None:
        processor.catches = BaseException
        self._processor = processor
        self._items: queue.SimpleQueue[Batch | StepEnd | threading.Event | None] = queue.SimpleQueue()
        self._closed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="tlcore-pipeline", daemon=True)
        self._thread.start()

    def submit(self, item: Batch | StepEnd) -> None:
        """Hand the item over; never waits (memory is bounded where it is acquired)."""
        self._items.put(item)

    def flush(self) -> None:
        """Wait until everything submitted so far is stored or booked."""
        done = threading.Event()
        self._items.put(done)
        while not done.wait(0.5):
            if not self._thread.is_alive():
                return

    def settle(self) -> None:
        """Have everything submitted so far stored soon; does not wait."""
        self._items.put(threading.Event())

    def close(self) -> None:
        """Finish everything submitted, close the processor, end the thread.

        A sink that works gets all the time it needs; one that fails is tried for a minute.
        """
        self._closed_at = time.monotonic()
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                self._processor.flush()
                item.set()
            elif isinstance(item, Batch):
                self._processor.batch(item, self._hopeless)
            else:
                self._processor.end_step(item, self._hopeless)
            del item
        self._processor.close()

    @property
    def _hopeless(self) -> bool:
        """Whether to fail what waits untried: each try may last minutes, and more comes meanwhile."""
        if self._processor.failing is None:
            return False
        closing = self._closed_at is not None and time.monotonic() - self._closed_at > _CLOSE_S
        return closing or self._items.qsize() > _MOST_WAITING
