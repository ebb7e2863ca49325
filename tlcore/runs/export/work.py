"""Who does the parts of an export: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, TypeVar

from ...errors import BackendError, TlcoreError
from .job import Advance, Job, Part

_T = TypeVar("_T")
Progress = Callable[[int, int], None]
# Parts that a cluster has beside those that are worked on, for each of its threads.
_AHEAD = 2
# How long a task is waited for before it is asked whether there are workers.
_SLICE_S = 30
# How long tasks that run are waited for after an error.
_END_S = 60

log = logging.getLogger("tlcore")


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

    def each(
        self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]
    ) -> Generator[_T, None, None]:
        """What ``work`` returns of each part, in order."""
        if self._threads == 1 or len(parts) == 1:
            for part in parts:
                yield work(job, part, self._advance)
            return
        pool = ThreadPoolExecutor(self._threads, "tlcore-export")
        try:

            def start(part: Part) -> Future[_T]:
                return pool.submit(work, job, part, self._advance)

            yield from _in_order(start, parts, self._threads + 1, _result, _cancel)
        finally:
            # Waits for those that have begun.
            pool.shutdown(cancel_futures=True)


def _result(future: Future[_T]) -> _T:
    return future.result()


def _cancel(futures: Sequence[Future[_T]]) -> None:
    for future in futures:
        future.cancel()


class Cluster:
    """The workers of a Dask cluster, by a `distributed.Client`.

    Each opens the run, and writes into the target, under the names that these have here.
    """

    share_memory = False

    def __init__(self, client: Any, advance: Advance) -> None:
        self._client, self._advance = client, advance

    def each(
        self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]
    ) -> Generator[_T, None, None]:
        """What ``work`` returns of each part, in order."""
        with closing(self._each(work, job, parts)) as results:
            while True:
                try:
                    items, found = next(results)
                except StopIteration:
                    return
                except TlcoreError:
                    raise
                except Exception as error:
                    # A worker that died or lacks a package, a task that was cancelled, a lost scheduler.
                    told = f"{type(error).__name__}: {error}"
                    raise BackendError(f"--dask: the cluster failed ({told})") from error
                self._advance(items)
                yield found

    def _each(
        self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]
    ) -> Generator[tuple[int, _T], None, None]:
        threads = self._threads()
        if not threads:
            raise BackendError("--dask: the cluster has no workers")
        # Sent once, and not with each part.
        shared = self._client.scatter(job, hash=False)

        def start(part: Part) -> Any:
            return self._client.submit(_counted, work, shared, part, pure=False)

        most = (1 + _AHEAD) * threads
        yield from _in_order(start, parts, most, self._result, self._end)

    def _threads(self) -> int:
        return sum(self._client.nthreads().values())

    def _result(self, future: Any) -> Any:
        """What a task gives, unless nobody is left who could do it."""
        from distributed import TimeoutError as NotYet

        while True:
            try:
                return future.result(timeout=_SLICE_S)
            except NotYet:
                if future.status == "error":
                    raise
                if not self._threads():
                    raise BackendError("--dask: all workers of the cluster have left") from None

    def _end(self, futures: Sequence[Any]) -> None:
        """Cancel tasks. Those that workers have begun cannot be: they are waited for, as they still write."""
        # What brought us here is the error that is told.
        with suppress(Exception):
            begun = {key for keys in self._client.processing().values() for key in keys}
            running = [future for future in futures if future.key in begun]
            self._client.cancel([future for future in futures if future.key not in begun])
            if not _ended(running):
                log.warning(
                    "--dask: tasks of an export that failed have not ended within %d s:"
                    " what they still write at a URL is to be removed by hand",
                    _END_S,
                )
            self._client.cancel(running)


def _ended(futures: Sequence[Any]) -> bool:
    """Whether all tasks of a cluster end in time."""
    from distributed import TimeoutError as NotYet

    until = time.monotonic() + _END_S
    for future in futures:
        try:
            future.exception(timeout=max(0.001, until - time.monotonic()))
        except NotYet:
            return False
    return True


def _counted(work: Callable[[Job, Part, Advance], _T], job: Job, part: Part) -> tuple[int, _T]:
    """What a part gives, and how many items it has."""
    done: list[int] = []
    try:
        found = work(job, part, done.append)
    except OSError as error:
        # Of the work and not of the cluster, which would be told the same way.
        raise BackendError(f"a worker of --dask cannot write ({error.strerror or error})") from error
    return sum(done), found


def _in_order(
    start: Callable[[Part], Any],
    parts: Sequence[Part],
    most: int,
    result: Callable[[Any], _T],
    end: Callable[[Sequence[Any]], None],
) -> Generator[_T, None, None]:
    """Results in order, of at most so many that were started; what is left of them is given to ``end``."""
    waiting: deque[Any] = deque()
    try:
        for part in parts:
            waiting.append(start(part))
            if len(waiting) >= most:
                yield _first(waiting, result)
        while waiting:
            yield _first(waiting, result)
    finally:
        if waiting:
            end(waiting)


def _first(waiting: deque[Any], result: Callable[[Any], _T]) -> _T:
    # One whose result is not there after an interrupt may still be at work.
    found = result(waiting[0])
    waiting.popleft()
    return found
