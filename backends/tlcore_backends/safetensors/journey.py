"""Segments on their way to a store: data files together, indexes one after the other, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tlcore.layout.templates import compact
from tlcore.protocols import Store

from .sealed import File, Sealed
from .shard_buffer import ShardBuffers

# What a segment's steps are told: an error, or None when they are stored.
Told = Callable[[Sequence[int], BaseException | None], None]


@dataclass(eq=False)
class _Job:
    """A segment that travels; ``missing`` counts data files that are not there yet."""

    sealed: Sealed | None = None
    missing: int = 0
    nbytes: int = 0
    error: BaseException | None = None
    sizes: list[tuple[str, int]] = field(default_factory=list)


class Journey:
    """Puts segments into ``store``, ``threads`` files at a time.

    An index follows its data, and the index of the segment before. ``told`` is called once for each
    segment's steps, ``hold`` with every change of the bytes in memory. `room` waits while more than
    ``most_bytes`` travel.
    """

    def __init__(
        self,
        store: Store,
        memory: ShardBuffers,
        threads: int,
        most_bytes: int,
        told: Told,
        hold: Callable[[int], None],
    ) -> None:
        self._store = store
        self._memory = memory
        self._most_bytes = most_bytes
        self._told = told
        self._hold = hold
        self._pool = ThreadPoolExecutor(threads, "tlcore-segment")
        self._jobs: deque[_Job] = deque()
        self._travelling = 0
        self._finishing = False
        self._changed = threading.Condition()
        self._next = _Job()
        # Each index that is stored, with its data files and their sizes, as the catalogue has them: a long
        # run has very many, and texts take the least memory.
        self.stored = bytearray()

    def send_file(self, file: File) -> None:
        """Send a data file of the next segment to be sealed."""
        job = self._next
        job.sizes.append((file.name, file.nbytes))
        with self._changed:
            job.missing += 1
            job.nbytes += file.nbytes
            self._travelling += file.nbytes
        self._hold(file.held_bytes)
        self._submit(lambda: self._put(job, file))

    def note_file(self, name: str, nbytes: int) -> None:
        """A data file of the next segment to be sealed is stored already."""
        self._next.sizes.append((name, nbytes))

    def send(self, sealed: Sealed) -> None:
        """Send a segment that is complete."""
        job = self._next
        if sealed.file is not None:
            self.send_file(sealed.file)
        with self._changed:
            job.sealed = sealed._replace(file=None)
            self._next = _Job()
            self._jobs.append(job)
        if not job.missing:
            self._submit(self._finish)

    def forget_files(self) -> None:
        """The data files sent so far belong to a step that failed: they are removed."""
        with self._changed:
            job, self._next = self._next, _Job()
        if job.sizes:
            self._wait_for(lambda: not job.missing)
            for name, _ in job.sizes:
                self._submit(partial(self._store.delete, name))

    def room(self) -> None:
        """Return when few enough bytes travel for more to follow."""
        self._wait_for(lambda: self._travelling <= self._most_bytes)

    def wait(self) -> None:
        """Return when every segment is stored or has failed."""
        self._wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """End the threads, after everything that was sent."""
        self.wait()
        self._pool.shutdown()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def _submit(self, call: Callable[[], object]) -> None:
        try:
            self._pool.submit(call)
        except RuntimeError:
            # The interpreter is ending, and takes no more work for threads: a session left open ends here.
            call()

    def _put(self, job: _Job, file: File) -> None:
        try:
            self._store.put(file.name, file.parts)
        except BaseException as error:
            job.error = job.error or error
        memory, nbytes, held, kept = file.memory, file.nbytes, file.held_bytes, file.kept
        kept.end(file.parts.end())
        del file
        for each in memory:
            self._memory.give(each)
        with self._changed:
            job.missing -= 1
            self._travelling -= nbytes
            self._changed.notify_all()
        self._hold(-held)
        self._finish()

    def _finish(self) -> None:
        """Put the index of each segment whose turn it is; one thread at a time does."""
        while True:
            with self._changed:
                if self._finishing or not self._jobs or self._jobs[0].missing:
                    return
                self._finishing = True
                job = self._jobs[0]
            self._finish_one(job)
            with self._changed:
                self._jobs.popleft()
                self._finishing = False
                self._changed.notify_all()

    def _finish_one(self, job: _Job) -> None:
        sealed = job.sealed
        if sealed is None:
            return
        if job.error is None:
            try:
                self._store.put(sealed.index_name, [sealed.text])
            except BaseException as error:
                job.error = error
            else:
                files = [{"file": file, "bytes": nbytes} for file, nbytes in job.sizes]
                entry = compact({"index": sealed.index_name, "files": files})
                self.stored += (b"," if self.stored else b"") + entry.encode("ascii")
        self._told(sealed.steps, job.error)
