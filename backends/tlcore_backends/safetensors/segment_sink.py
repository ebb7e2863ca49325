"""The ``safetensors`` backend, layout version 2: many steps in one segment, told stored when it is."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tlcore.alike import AlikeStep, Move
from tlcore.errors import BackendError, ReadError, shareable
from tlcore.layout.checksums import with_checksum
from tlcore.layout.templates import compact
from tlcore.ledger import Counts
from tlcore.protocols import Lease
from tlcore.record import Record, RunInfo, StepSummary
from tlcore.storage import SupportsAppend, SupportsFiles

from ..storage.run_store import store_of
from ..storage.writes_behind import WritesBehind
from .columns import Column
from .journey import Journey
from .moved_files import CannotMoveError, MovedFiles
from .plans import Plan, Plans
from .segment_names import catalogue_name
from .segments import MOST_ARRAYS, Segment
from .shard_buffer import ShardBuffers

log = logging.getLogger("tlcore")

SEGMENT_BYTES = 128 << 20
REMOTE_COMMIT_S = 5.0
LOCAL_COMMIT_S = 1.0
_LOCAL_THREADS = 2
_REMOTE_THREADS = 8
# Of the queue's bound: what one segment may take, and what all that travel may.
_FILLING_SHARE = 4
_TRAVELLING_SHARE = 2
# Steps that others may be said to be like; each stands for a kind of many, of which a run has few.
_MOST_REMEMBERED = 64

# A smaller step is put together in memory: its file would be mostly the room that is kept for its header.
_LEAST_LARGE = 16 << 20

Stored = Callable[[int, BaseException | None], None]


class SegmentSink:
    """Writes ``segments/rank_<r>_<n>.safetensors`` and, last, the index that commits its steps.

    A segment is closed at ``segment_bytes`` or a quarter of the queue's bound, ``commit_s`` seconds after
    its first step ended (0: with each step; None: 5 at a URL, 1 on the local disk), when its header is
    full, at a `flush`, and at the end. A step that is larger gets several data files.
    """

    layout: int = 2
    alike_in_capture: bool = True
    keeps_memory: bool = False

    def __init__(self, segment_bytes: int = SEGMENT_BYTES, commit_s: float | None = None) -> None:
        self._segment_bytes = segment_bytes
        self._commit_s = commit_s
        self._stored: Stored = lambda step, error: None

    def would_take(self, source: object) -> bool:
        """Segments; unless this sink would make far fewer of them, or more, or when they end is said."""
        from .segment_source import SegmentSource

        if not isinstance(source, SegmentSource) or self._commit_s is not None:
            return False
        count, nbytes = source.extent
        needed = nbytes / self._segment_bytes
        return count <= 2 * max(1, needed) and needed <= 2 * count

    def tell_stored(self, stored: Stored) -> None:
        """Have ``stored(step, error)`` called, in any thread, once for each step that was accepted."""
        self._stored = stored

    def open(self, run: RunInfo) -> None:
        """Begin to write into ``run.store``."""
        self._store = store = store_of(run)
        is_local = isinstance(store, SupportsFiles)
        self._rank = run.rank
        self._ledger = run.ledger
        if self._commit_s is None:
            self._commit_s = LOCAL_COMMIT_S if is_local else REMOTE_COMMIT_S
        queue_bytes = run.queue_bytes or 8 * self._segment_bytes
        self._most_bytes = max(1, min(self._segment_bytes, queue_bytes // _FILLING_SHARE))
        # Of two steps of this size no segment has room for both: where a file can be written before it is
        # whole, such a step goes there at once.
        self._large_bytes = max(_LEAST_LARGE, self._most_bytes // 2)
        self._appending = store if isinstance(store, SupportsAppend) else None
        # On a local disk a file is written soon, or while its step comes.
        self.keeps_memory = not is_local and self._appending is None
        self._apart = Column.is_in_large_pieces if is_local else Column.is_in_large_parts
        # A segment ends with the step that fills it.
        self._memory = ShardBuffers(self._most_bytes + self._most_bytes // 4)
        self._plans = Plans()
        self._plans_of: OrderedDict[int, Plan] = OrderedDict()
        self._number = 0
        self._hold = run.hold
        self._held = 0
        self._segment = self._new_segment()
        self._step: int | None = None
        # Counts of steps that were accepted and are not yet in the ledger.
        self._accepted: dict[int, Counts] = {}
        threads = _LOCAL_THREADS if is_local else _REMOTE_THREADS
        travelling = max(self._most_bytes, queue_bytes // _TRAVELLING_SHARE)
        self._journey = Journey(store, self._memory, threads, travelling, self._told, self._hold)
        # Around a step's way from those accepted into the ledger.
        self._booking = threading.Lock()
        self._due: float | None = None
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._timer: threading.Thread | None = None

    def write(self, batch: Sequence[Record]) -> None:
        """Copy records of one step."""
        self._write(batch, None)

    def write_lent(self, batch: Sequence[Record], lease: Lease) -> bool:
        """Keep the memory of records until they are sent, where their step began so."""
        return self._write(batch, lease)

    def _write(self, batch: Sequence[Record], lease: Lease | None) -> bool:
        if not batch:
            return False
        self._journey.room()
        with self._changed:
            if batch[0].step != self._step:
                self._abandon()
                self._step = batch[0].step
            if not self._segment.is_empty and self._segment.nbytes >= self._most_bytes:
                self._seal()
            if self._was_large and sum(record.data.nbytes for record in batch) >= self._large_bytes // 4:
                self._stream()
            kept = self._segment.write(batch, lease)
            if self._segment.open_bytes >= self._large_bytes:
                self._stream()
            if self._segment.is_empty and self._is_full_of_open_step:
                self._journey.send_file(self._segment.file_open_step())
            self._count()
        return kept

    def _stream(self) -> None:
        """Write the open step, which is too large to share a segment, into files while it comes."""
        if self._appending is None or self._segment.is_streamed or self._segment.has_files:
            return
        self._seal()
        self._segment.stream(self._appending, self._most_bytes, self._journey.note_file)

    @property
    def _is_full_of_open_step(self) -> bool:
        segment = self._segment
        return not segment.is_streamed and (
            segment.nbytes >= self._most_bytes or segment.open_arrays >= MOST_ARRAYS
        )

    @property
    def _was_large(self) -> bool:
        last = self._plans.last
        return last is not None and last.nbytes >= self._large_bytes

    def commit_step(self, step: StepSummary) -> None:
        """Accept the step; it is stored when its segment is."""
        self._journey.room()
        with self._changed:
            if step.step != self._step:
                self._abandon()
            self._step = None
            self._seal_before(step.step)
            self._remember(step.step, self._segment.commit(step))
            self._accept(step)
        if self._commit_s == 0:
            self._journey.wait()

    def write_alike(self, step: AlikeStep, summary: StepSummary) -> bool:
        """Write and accept a step that is like one of the last; False where it is not known any more."""
        plan = self._plans_of.get(step.like)
        return plan is not None and self._write_of(plan, step, summary)

    def write_resized(self, step: AlikeStep, rows: bytes, summary: StepSummary) -> bool:
        """The same for a step that differs from one of the last in how many ``rows`` tensors have."""
        plan = self._plans_of.get(step.like)
        if plan is None:
            return False
        plan = plan.resized(rows)
        if not self._write_of(plan, step, summary):
            return False
        self._remember(step.step, plan)
        return True

    def _write_of(self, plan: Plan, step: AlikeStep, summary: StepSummary) -> bool:
        """Write and accept a step of a plan, unless it gets data files of its own."""
        if plan.nbytes != step.nbytes:
            return False
        if plan.nbytes >= self._large_bytes or len(plan.slots) >= MOST_ARRAYS:
            return False
        self._journey.room()
        with self._changed:
            self._abandon()
            self._seal_before(summary.step)
            if not self._segment.commit_alike(plan, summary, step.hashes, step.fill):
                return False
            if step.like in self._plans_of:
                self._plans_of.move_to_end(step.like)
            self._accept(summary)
        if self._commit_s == 0:
            self._journey.wait()
        return True

    def write_whole(self, batches: Iterable[Sequence[Record]], summary: StepSummary) -> bool:
        """Write a step that is too large to share a segment into files while it comes."""
        store = self._appending
        if store is None or summary.counts.bytes_stored < self._large_bytes:
            return False
        self._journey.room()
        # While a batch is written the next is read, and what is known of its tensors is put together.
        with ThreadPoolExecutor(1, "tlcore-write") as pool:
            with self._changed:
                self._abandon()
                self._seal()
                self._segment.stream(WritesBehind(store, pool), self._most_bytes, self._journey.note_file)
                self._step = summary.step
            for batch in batches:
                self.write(batch)
            self.commit_step(summary)
        return True

    def write_moved(self, batches: Iterable[tuple[Sequence[Record], Move]], summary: StepSummary) -> bool:
        """Write a step that is too large to share a segment into files without reading its tensors here."""
        store = self._appending
        if store is None or summary.counts.bytes_stored < self._large_bytes:
            return False
        self._journey.room()
        with self._changed, ThreadPoolExecutor(_LOCAL_THREADS, "tlcore-move") as pool:
            self._abandon()
            self._seal()
            files = MovedFiles(store, pool)
            try:
                self._segment.stream(files, self._most_bytes, lambda name, nbytes: None)
                for records, move in batches:
                    self._segment.write_unread(records, files.unread(records, move))
                # What there is to say of the step is said while the files are written.
                plan = self._segment.commit(summary)
                files.publish(self._journey.note_file)
            except BaseException as error:
                files.abandon()
                self._segment.abandon_step()
                self._journey.forget_files()
                self._number = self._segment.number
                self._segment = self._new_segment()
                if isinstance(error, (ReadError, CannotMoveError)):
                    return False
                raise
            self._remember(summary.step, plan)
            self._accept(summary)
        if self._commit_s == 0:
            self._journey.wait()
        return True

    def _remember(self, step: int, plan: Plan) -> None:
        self._plans_of[step] = plan
        if len(self._plans_of) > _MOST_REMEMBERED:
            self._plans_of.popitem(last=False)

    def _seal_before(self, step: int) -> None:
        """Begin another segment for a step that does not follow those of this one."""
        if not self._segment.is_empty and step <= self._segment.numbers[-1]:
            self._seal()

    def _accept(self, step: StepSummary) -> None:
        """Note that a step was committed to the segment, and send it on its way where it is time."""
        counts = Counts()
        counts.add(step.counts)
        with self._booking:
            self._accepted[step.step] = counts
        if self._due is None:
            self._due = time.monotonic() + (self._commit_s or 0)
            self._start_timer()
        if self._segment.full or self._segment.nbytes >= self._most_bytes or self._commit_s == 0:
            self._seal()
        self._count()

    def flush(self) -> None:
        """Return when every step that was accepted is stored or has failed."""
        with self._changed:
            self._seal()
        self._journey.wait()

    def close(self) -> None:
        """Store what is left and the list of all segments."""
        with self._changed:
            self._abandon()
            self._seal()
            self._closed = True
            self._changed.notify_all()
        self._journey.wait()
        if self._timer is not None:
            self._timer.join()
        try:
            self._put_catalogue()
        finally:
            self._journey.close()
            self._memory.clear()
            self._hold(-self._held)
            self._held = 0

    def _put_catalogue(self) -> None:
        document = {"layout": 2, "rank": self._rank, "ledger": self._ledger.snapshot().to_json()}
        segments = self._journey.stored.decode("ascii")
        text = f'{compact(document)[:-1]},"segments":[{segments}]}}\n'
        try:
            self._store.put(catalogue_name(self._rank), [with_checksum(text)])
        except (BackendError, OSError) as error:
            # Whoever reads the run lists its files instead: it lacks nothing.
            log.info("the list of the run's segments could not be written: %s", shareable(error))

    def _new_segment(self) -> Segment:
        segment = Segment(self._rank, self._number, self._plans, self._memory, self._apart)
        self._number += 1
        return segment

    def _abandon(self) -> None:
        """Forget a step that was begun and never committed."""
        self._segment.abandon_step()
        if self._segment.has_files:
            self._journey.forget_files()
            self._segment = self._new_segment()
        self._step = None

    def _seal(self) -> None:
        """Send the segment, with all steps that have ended, on its way."""
        self._due = None
        if self._segment.is_empty:
            return
        segment, self._segment = self._segment, self._new_segment()
        segment.hand_over_step(self._segment)
        with self._booking:
            so_far = self._ledger.snapshot()
            for counts in self._accepted.values():
                so_far.add(counts)
        try:
            self._journey.send(segment.seal(so_far))
        except BaseException as error:
            self._told(segment.numbers, error)
        self._count()

    def _count(self) -> None:
        """Tell the queue how much the segment that is filled takes."""
        change = self._segment.copied_bytes - self._held
        if change:
            self._held += change
            self._hold(change)

    def _told(self, steps: Sequence[int], error: BaseException | None) -> None:
        with self._booking:
            for step in steps:
                self._stored(step, error)
                self._accepted.pop(step, None)

    def _start_timer(self) -> None:
        self._changed.notify_all()
        if self._timer is not None or not self._commit_s:
            return
        timer = threading.Thread(target=self._keep_time, name="tlcore-commit", daemon=True)
        try:
            timer.start()
        except RuntimeError:
            # No thread can be had: segments are closed when they are full, and at the end.
            return
        self._timer = timer

    def _keep_time(self) -> None:
        with self._changed:
            while not self._closed:
                if self._due is None:
                    self._changed.wait()
                    continue
                left = self._due - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                else:
                    self._seal()
