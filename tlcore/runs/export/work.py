"""Who does the parts of an export: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ...errors import BackendError, TlcoreError
from .job import Advance, Job, Part

_T = TypeVar("_T")
Progress = Callable[[int, int], None]
# Parts that a cluster has beside those that are worked on, for each of its threads.
_AHEAD = 2


class Counting:
    """How many items are written, told one after the other whoever writes them."""

    def __init__(self, total: int, on_item: Progress) -> None:
        self._total, self._on_item = total, on_item
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, items: int) -> None:
        """So many more are written."""
        with self._lock:
            self._done += items
            self._on_item(self._done, self._total)


class Here:
    """Threads of this process: while one reads, another writes."""

    share_memory = True

    def __init__(self, threads: int, advance: Advance) -> None:
        self._threads, self._advance = threads, advance

    def each(self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]) -> Iterator[_T]:
        """What ``work`` returns of each part, in order."""
        if self._threads == 1 or len(parts) == 1:
            for part in parts:
                yield work(job, part, self._advance)
            return
        pool = ThreadPoolExecutor(self._threads, "tlcore-export")
        try:
            yield from _in_order(
                lambda part: pool.submit(work, job, part, self._advance), parts, self._threads + 1
            )
        finally:
            pool.shutdown(cancel_futures=True)


class Cluster:
    """The workers of a Dask cluster, by a `distributed.Client`.

    Each opens the run, and writes into the target, under the names that these have here.
    """

    share_memory = False

    def __init__(self, client: Any, advance: Advance) -> None:
        self._client, self._advance = client, advance

    def each(self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]) -> Iterator[_T]:
        """What ``work`` returns of each part, in order."""
        # Sent once, and not with each part.
        shared = self._client.scatter(job, hash=False)
        threads = sum(self._client.nthreads().values())
        if not threads:
            raise BackendError("--dask: the cluster has no workers")

        def start(part: Part) -> Any:
            return self._client.submit(_counted, work, shared, part, pure=False)

        try:
            for items, found in _in_order(start, parts, (1 + _AHEAD) * threads):
                self._advance(items)
                yield found
        except (TlcoreError, OSError):
            raise
        except Exception as error:
            # A worker that died, one that lacks a package, a task that somebody has cancelled.
            raise BackendError(f"--dask: the cluster failed ({type(error).__name__}: {error})") from error


def _counted(work: Callable[[Job, Part, Advance], _T], job: Job, part: Part) -> tuple[int, _T]:
    """What a part gives, and how many items it has."""
    done: list[int] = []
    found = work(job, part, done.append)
    return sum(done), found


def _in_order(start: Callable[[Part], Future[_T]], parts: Sequence[Part], most: int) -> Iterator[_T]:
    """Results in order, of at most so many that were started."""
    waiting: deque[Future[_T]] = deque()
    left = iter(parts)
    try:
        for part in left:
            waiting.append(start(part))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
