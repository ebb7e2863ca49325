"""From staged batches to a sink: naming, hashing, duplicates, the ledger; inline or in background."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash

from . import names
from .names import PathKey
from .protocols import Sink
from .record import Counts, Direction, Json, Ledger, Record, StepSummary
from .staging import Chunk, HostPool, Slot
from .structure import Branch, describe

log = logging.getLogger("tlcore")


class Event(NamedTuple):
    """One side of one module call: its frozen structure and the slots in it, in order."""

    module: str
    call: int
    direction: Direction
    node: Any
    kwargs: Branch | None
    slots: Sequence[Slot]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole events of one step, with the chunks that hold their bytes."""

    step: int
    events: Sequence[Event]
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A step's end: everything that is not in its events."""

    step: int
    calls: Sequence[tuple[str, int]]
    started: str
    ended: str
    rows: Sequence[Json] | None
    extra: Mapping[str, Any]


@dataclass(slots=True)
class _OpenStep:
    """What the pipeline gathers of a step until it is committed."""

    counts: Counts = field(default_factory=Counts)
    structures: dict[str, Json] = field(default_factory=dict)
    stems: dict[str, set[str]] = field(default_factory=dict)
    first: dict[tuple[torch.dtype, tuple[int, ...], str], str] = field(default_factory=dict)
    written: int = 0
    bytes_written: int = 0
    error: BaseException | None = None


class Processor:
    """Turns batches into sink calls, one step after the other; used by one thread at a time."""

    def __init__(
        self, sink: Sink, pool: HostPool, ledger: Ledger, rank: int, module_names: frozenset[str]
    ) -> None:
        self._sink = sink
        self._pool = pool
        self._ledger = ledger
        self._rank = rank
        self._module_names = module_names
        self._steps: dict[int, _OpenStep] = {}
        self.first_error: BaseException | None = None

    def batch(self, batch: Batch) -> None:
        """Name, hash and write a batch, then give its memory back."""
        step = self._steps.setdefault(batch.step, _OpenStep())
        try:
            records = [record for event in batch.events for record in self._records(batch.step, step, event)]
            if step.error is None:
                self._write(step, records)
        except Exception as error:
            step.error = step.error or error
        finally:
            for chunk in batch.chunks:
                self._pool.release(chunk)

    def _write(self, step: _OpenStep, records: Sequence[Record]) -> None:
        if not records:
            return
        self._sink.write(records)
        step.written += len(records)
        step.bytes_written += sum(record.nbytes for record in records if record.alias_of is None)

    def _records(self, number: int, step: _OpenStep, event: Event) -> list[Record]:
        directory = names.call_dir(event.module, event.call, self._module_names)
        taken = step.stems.setdefault(directory, set())
        paths: list[tuple[tuple[PathKey, ...], Slot]] = []

        def name(path: tuple[PathKey, ...], slot: Slot) -> None:
            stem = names.unique(names.stem(event.direction, path, slot.device, self._rank), taken)
            slot.name = f"{names.step_dir(number)}/{directory}/{stem}"
            paths.append((path, slot))

        document = describe(event.node, (), name)
        if event.kwargs is not None:
            document["kwargs"] = describe(event.kwargs, (), name)
        step.structures[f"{directory}/{event.direction}.json"] = document
        for slot in event.slots:
            _book(step.counts, slot)
        return [self._record(number, step, event, path, slot) for path, slot in paths]

    def _record(
        self, number: int, step: _OpenStep, event: Event, path: tuple[PathKey, ...], slot: Slot
    ) -> Record:
        data = slot.data()
        digest = xxhash.xxh3_128_hexdigest(data)
        first = step.first.setdefault((slot.dtype, slot.shape, digest), slot.name)
        return Record(
            name=slot.name,
            step=number,
            rank=self._rank,
            module=event.module,
            call=event.call,
            direction=event.direction,
            path=path,
            dtype=slot.dtype,
            shape=tuple(slot.shape),
            device=slot.device,
            data=data,
            hash=digest,
            alias_of=None if first == slot.name else first,
        )

    def end_step(self, end: StepEnd) -> None:
        """Commit the step and book its ledger; a step that cannot be committed counts as failed."""
        step = self._steps.pop(end.step, None) or _OpenStep()
        counts = step.counts
        staged = counts.captured - counts.skipped - counts.dropped - counts.failed
        if step.error is None:
            counts.stored, counts.bytes_stored = step.written, step.bytes_written
            try:
                self._sink.commit_step(self._summary(end, step))
            except Exception as error:
                step.error = error
        if step.error is not None:
            counts.stored = counts.bytes_stored = 0
            counts.failed += staged
            counts.reasons[f"failed: {type(step.error).__name__}"] += staged
            self._failed(end.step, step.error)
        self._ledger.add(counts)

    def _summary(self, end: StepEnd, step: _OpenStep) -> StepSummary:
        return StepSummary(
            step=end.step,
            rank=self._rank,
            calls=[names.call_dir(module, call, self._module_names) for module, call in end.calls],
            structures=step.structures,
            counts=step.counts,
            started=end.started,
            ended=end.ended,
            rows=end.rows,
            extra=end.extra,
        )

    def _failed(self, number: int, error: BaseException) -> None:
        if self.first_error is None:
            self.first_error = error
            log.warning(
                "step %d could not be stored and counts as failed; further failures are only counted: %s",
                number,
                error,
            )

    def close(self) -> None:
        """Close the sink; steps still open count as failed."""
        for number, step in sorted(self._steps.items()):
            step.error = step.error or RuntimeError("the step never ended")
            self.end_step(StepEnd(number, [], "", "", None, {}))
        try:
            self._sink.close()
        except Exception as error:
            if self.first_error is None:
                self.first_error = error
            log.warning("the run could not be closed: %s", error)


def _book(counts: Counts, slot: Slot) -> None:
    if not slot.counted:
        return
    counts.captured += 1
    counts.bytes_captured += slot.nbytes
    if slot.skipped:
        counts.skipped += 1
        counts.reasons[f"skipped: {slot.skipped}"] += 1
    elif slot.failed:
        counts.failed += 1
        counts.reasons[f"failed: {slot.failed}"] += 1
    elif slot.dropped:
        counts.dropped += 1
        counts.reasons["dropped: queue full"] += 1


class InlinePipeline:
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
        """Nothing is ever pending."""

    def close(self) -> None:
        """Close the processor."""
        self._processor.close()


class ThreadPipeline:
    """Runs the processor on one background thread; the order of items is kept."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._items: queue.SimpleQueue[Batch | StepEnd | threading.Event | None] = queue.SimpleQueue()
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

    def close(self) -> None:
        """Finish everything submitted, close the processor, end the thread."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, Batch):
                self._processor.batch(item)
            else:
                self._processor.end_step(item)
            del item
        self._processor.close()
