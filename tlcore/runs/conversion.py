"""A rank's steps on their way to another backend's sink: whole where they are alike, else by records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ..alike import AlikeStep, Move, SupportsWriteAlike, SupportsWriteMoved, SupportsWriteWhole
from ..engine.run_documents import RunDocuments, close_run
from ..errors import ReadError, VerifyError
from ..layout.hashes import HASH_BYTES, HASH_PREFIX
from ..layout.names import step_dir
from ..layout.run_files import STEP_KEYS
from ..layout.templates import LateStructures, Structures, compact, structures_of
from ..ledger import Counts
from ..locations import is_url
from ..protocols import Sink, SupportsLateCommit
from ..reader import Run, Step
from ..reader.alike import alike_steps
from ..reader.bulk import Payload, move_whole, read_payloads, read_whole
from ..reader.documents import counts_of
from ..record import Json, Origin, Record, StepSummary

# Records are handed over in batches: a remote place gets many at a time, the local disk what the cache holds.
_REMOTE_BATCH_BYTES = 64 << 20
_LOCAL_BATCH_BYTES = 16 << 20
# Records of small steps that are read together.
_MOST_TOGETHER = 8192


def convert_rank(source: Run, sink: Sink, documents: RunDocuments, on_tensors: Callable[[int], None]) -> None:
    """Write all whole steps of a rank, and close the run. Raises as `convert` does."""
    documents.open()
    run = documents.run
    sink.open(run)
    booked = _Booking(source, sink, documents)
    batch_bytes = _REMOTE_BATCH_BYTES if is_url(run.url) else _LOCAL_BATCH_BYTES
    steps = _Steps(source, sink, run.rank, batch_bytes, booked, on_tensors)
    try:
        steps.write()
    except Exception:
        # What is on its way must not change the place when this has ended.
        with suppress(Exception):
            _flush(sink)
        raise
    _flush(sink)
    # Of steps that the source does not have, and that the ledger counts.
    run.ledger.add(booked.left)
    # What was told late is known when the sink is closed; without an end mark the run reads as incomplete.
    close_run(sink, documents, lambda: not booked.lost)
    if booked.lost:
        raise booked.lost[0]


def _flush(sink: Sink) -> None:
    if isinstance(sink, SupportsLateCommit):
        sink.flush()


class _Booking:
    """What became of the steps that the sink has accepted."""

    def __init__(self, source: Run, sink: Sink, documents: RunDocuments) -> None:
        self._ledger = documents.run.ledger
        self._accepted: dict[int, Counts] = {}
        self.left = source.ledger_of(documents.run.rank)
        self.lost: list[BaseException] = []
        self._late = isinstance(sink, SupportsLateCommit)
        if isinstance(sink, SupportsLateCommit):
            sink.tell_stored(self._stored)

    def _stored(self, step: int, error: BaseException | None) -> None:
        if error is not None:
            self.lost.append(error)
        counts = self._accepted.pop(step)
        self._ledger.add(counts)
        self.left.subtract(counts)

    def committed(self, summary: StepSummary, commit: Callable[[], bool]) -> bool:
        """Whether ``commit`` has had the sink accept a step."""
        # It may be told as stored before it is said to be accepted.
        self._accepted[summary.step] = summary.counts
        if not commit():
            self._accepted.pop(summary.step)
            return False
        if not self._late:
            self._stored(summary.step, None)
        return True


class _Steps:
    """The steps on their way; a few small ones are read together."""

    def __init__(
        self,
        source: Run,
        sink: Sink,
        rank: int,
        batch_bytes: int,
        booked: _Booking,
        on_tensors: Callable[[int], None],
    ) -> None:
        self._source, self._sink, self._rank = source, sink, rank
        self._batch_bytes, self._booked, self._on_tensors = batch_bytes, booked, on_tensors
        self._window: list[tuple[list[Json], StepSummary]] = []
        self._bytes = self._count = 0

    def write(self) -> None:
        """Write all of them, up to one that is lost."""
        sink = self._sink
        alike: Iterator[AlikeStep] = iter(())
        # A step alone is like none.
        if isinstance(sink, SupportsWriteAlike) and len(self._source) > 1:
            alike = alike_steps(self._source.stored, self._rank)
        known = next(alike, None)
        for step in self._source.values():
            if self._rank not in step.ranks or self._booked.lost:
                continue
            while known is not None and known.step < step.number:
                known = next(alike, None)
            if known is not None and known.step == step.number and isinstance(sink, SupportsWriteAlike):
                # What it is like may still be waiting.
                self._write_window()
                if self._write_alike(sink, known):
                    continue
            self._add(step)
        self._write_window()

    def _write_alike(self, sink: SupportsWriteAlike, step: AlikeStep) -> bool:
        summary = _summary(step.document, step.step, self._rank, {})
        written = self._booked.committed(summary, lambda: sink.write_alike(step, summary))
        if written:
            self._on_tensors(len(step.hashes) // HASH_BYTES)
        return written

    def _add(self, step: Step) -> None:
        """Write a step with those that follow, as far as their bytes fit together; or a large one alone."""
        document = step.documents[self._rank]
        records = document["records"]
        nbytes = sum(record["bytes"] for record in records)
        if self._bytes + nbytes > self._batch_bytes or self._count + len(records) > _MOST_TOGETHER:
            self._write_window()
        # Those of several steps are read while each step's document is at hand.
        late = nbytes > self._batch_bytes
        structures = LateStructures(partial(self._structures, step)) if late else self._structures(step)
        self._window.append((records, _summary(document, step.number, self._rank, structures)))
        self._bytes, self._count = self._bytes + nbytes, self._count + max(1, len(records))

    def _structures(self, step: Step) -> Structures:
        """A step's structures; of a step that is written whole read while its tensors are on their way."""
        for problem in self._source.stored.problems(step.number, self._rank, thorough=False):
            raise ReadError(f"{self._source.url}: {problem}")
        return step.structure_texts(self._rank)

    def _write_window(self) -> None:
        window, self._window = self._window, []
        self._bytes = self._count = 0
        entries = [entry for records, _ in window for entry in records]
        # Once a batch was handed on nobody looks at its bytes again.
        payloads = read_payloads(self._source.stored, entries, keep=True)
        for records, summary in window:
            if self._booked.lost:
                break
            # Nothing is read of a step that was written so.
            if len(window) > 1 or not self._write_whole(records, summary):
                self._write_step(itertools.islice(payloads, len(records)), summary)

    def _write_whole(self, records: Sequence[Json], summary: StepSummary) -> bool:
        sink = self._sink
        if isinstance(sink, SupportsWriteMoved) and not self._source.is_foreign:
            moved = self._moved_batches(records, summary)
            if self._booked.committed(summary, lambda: sink.write_moved(moved, summary)):
                self._on_tensors(len(records))
                return True
        if not isinstance(sink, SupportsWriteWhole):
            return False
        batches = self._whole_batches(records, summary)
        return self._booked.committed(summary, lambda: sink.write_whole(batches, summary))

    def _write_step(self, payloads: Iterable[Payload], summary: StepSummary) -> None:
        sink = self._sink
        # What is wrong with these is known before anything of the step is written.
        structures_of(step_dir(summary.step), summary.structures)
        for batch in self._batches(payloads, summary, self._batch_bytes):
            sink.write(batch)

        def commit() -> bool:
            sink.commit_step(summary)
            return True

        self._booked.committed(summary, commit)

    def _whole_batches(self, entries: Sequence[Json], summary: StepSummary) -> Iterator[list[Record]]:
        """The records of a step as they are read, each time in memory that is soon used again."""
        known: _Known = {}
        hashed = not self._source.is_foreign
        for group in read_whole(self._source.stored, entries):
            batch = list(_records(group, summary.step, self._rank, hashed, known))
            yield batch
            self._on_tensors(len(batch))

    def _moved_batches(
        self, entries: Sequence[Json], summary: StepSummary
    ) -> Iterator[tuple[list[Record], Move]]:
        """The records of a step without their bytes, and what writes these."""
        known: _Known = {}
        for payloads, move in move_whole(self._source.stored, entries):
            yield list(_records(payloads, summary.step, self._rank, True, known)), move

    def _batches(
        self, payloads: Iterable[Payload], summary: StepSummary, batch_bytes: int
    ) -> Iterator[list[Record]]:
        records = _records(payloads, summary.step, self._rank, not self._source.is_foreign, {})
        for batch in _batches(records, batch_bytes):
            yield batch
            self._on_tensors(len(batch))


# The hash, dtype and shape of the records of a step so far, by name.
_Known = dict[str, tuple[Any, ...]]


def _records(
    payloads: Iterable[Payload], step: int, rank: int, hashed: bool, known: _Known
) -> Iterator[Record]:
    for payload in payloads:
        record = _record(step, rank, payload, hashed)
        own = record.hash, record.dtype, record.shape
        if record.alias_of is not None and known.get(record.alias_of) != own:
            raise ReadError(f"step {step}: {record.name} is no alias of {record.alias_of!r}")
        known[record.name] = own
        yield record


def _batches(records: Iterable[Record], batch_bytes: int) -> Iterator[list[Record]]:
    """Records in the order they were stored, about ``batch_bytes`` at a time."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.nbytes
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record(step: int, rank: int, stored: Payload, hashed: bool) -> Record:
    entry = stored.record
    if stored.problem is not None:
        raise ReadError(stored.problem)
    if hashed and entry["hash"] != f"{HASH_PREFIX}{stored.digest}":
        raise VerifyError([f"{entry['name']}: {HASH_PREFIX}{stored.digest}, step.json says {entry['hash']}"])
    origin = Origin(
        rank,
        entry["module"],
        entry["call"],
        entry["direction"],
        tuple(entry["path"]),
        getattr(torch, entry["dtype"]),
        tuple(entry["shape"]),
        entry["device"],
        compact(entry["placements"]) if "placements" in entry else "",
        str(entry.get("converted_from") or ""),
    )
    return Record(entry["name"], step, origin, stored.data, stored.digest, entry.get("alias_of"))


def summary_of(step: Step, rank: int) -> StepSummary:
    """All of a rank's step that is not tensor bytes, as the capture handed it over."""
    return _summary(step.documents[rank], step.number, rank, step.structure_texts(rank))


def _summary(document: Json, step: int, rank: int, structures: Mapping[str, Json]) -> StepSummary:
    return StepSummary(
        step=step,
        rank=rank,
        calls=document["calls"],
        structures=structures,
        counts=counts_of(document, f"step {step}"),
        started=str(document.get("started", "")),
        ended=str(document.get("ended", "")),
        rows=document.get("rows"),
        extra={key: value for key, value in document.items() if key not in STEP_KEYS},
    )
