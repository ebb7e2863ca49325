"""Ranges of files that threads read and hash, many files in one call.

Between two calls a thread waits for the interpreter, which who looks at documents meanwhile has.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tlcore.errors import ReadError

# What is told after one call.
_MOST_BYTES = 64 << 20
_MOST_FILES = 16

# Ranges ``[n, 2]`` of a file.
Wanted = tuple[str, np.ndarray]
# The digests of each file's ranges, up to the first that cannot be read; or why none of them can.
HashMany = Callable[[Sequence[Wanted]], Sequence[bytes | ReadError]]


class _Job(NamedTuple):
    wanted: Wanted
    nbytes: int
    digests: Future[bytes]


class HashQueue:
    """Has ``hash_many`` called by ``threads`` of ``pool``, with all that waits shared among them."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int, hash_many: HashMany) -> None:
        self._pool, self._threads, self._hash_many = pool, threads, hash_many
        self._waiting: deque[_Job] = deque()
        self._working = 0
        self._lock = threading.Lock()

    def submit(self, file: str, ranges: np.ndarray) -> Future[bytes]:
        """The digests of ranges of a file."""
        job = _Job((file, ranges), int((ranges[:, 1] - ranges[:, 0]).sum()), Future())
        with self._lock:
            self._waiting.append(job)
            begins = self._working < self._threads
            self._working += begins
        if begins:
            self._pool.submit(self._work)
        return job.digests

    def cancel(self) -> None:
        """Begin nothing more; who waits for that is told."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.digests.cancel()

    def _work(self) -> None:
        while jobs := self._take():
            try:
                found = self._hash_many([job.wanted for job in jobs])
            except BaseException as error:
                for job in jobs:
                    job.digests.set_exception(error)
                continue
            for job, digests in zip(jobs, found, strict=True):
                if isinstance(digests, ReadError):
                    job.digests.set_exception(digests)
                else:
                    job.digests.set_result(digests)

    def _take(self) -> list[_Job]:
        """This thread's share of what waits; none where it ends."""
        with self._lock:
            share = min(_MOST_FILES, -(-len(self._waiting) // self._threads))
            jobs: list[_Job] = []
            while len(jobs) < share and (not jobs or sum(job.nbytes for job in jobs) < _MOST_BYTES):
                jobs.append(self._waiting.popleft())
            self._working -= not jobs
            return jobs
