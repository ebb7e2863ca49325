"""Many files to a store at once: requests to a remote one, system calls to the local disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from tlcore.storage import Buffer, Store, SupportsFiles

_REMOTE_THREADS = 16
# Making a file waits for the file system more than it computes. A few at a time share one handover.
_LOCAL_THREADS = 4
_LOCAL_GROUP = 8


class Uploads:
    """Puts and copies into ``store``, several at the same time; `wait` ends a group.

    What the calls refer to must stay as it is until `wait` returns.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        local = isinstance(store, SupportsFiles)
        self._group_size = _LOCAL_GROUP if local else 1
        self._pool = ThreadPoolExecutor(_LOCAL_THREADS if local else _REMOTE_THREADS, "tlcore-upload")
        self._group: list[Callable[[], object]] = []
        self._running: list[Future[object]] = []

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Publish a blob."""
        self.run(lambda: self._store.put(name, parts))

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source``, which an earlier group has put."""
        self.run(lambda: self._store.copy(source, target))

    def wait(self) -> None:
        """Return when everything asked for so far is done; raises the first error among it."""
        self._hand_over()
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def delete(self, name: str) -> None:
        """Remove a blob."""
        self.run(lambda: self._store.delete(name))

    def run(self, call: Callable[[], object]) -> None:
        """Do anything else that belongs to the group."""
        self._group.append(call)
        if len(self._group) >= self._group_size:
            self._hand_over()

    def start(self, call: Callable[[], object]) -> None:
        """Begin at once with something that takes longer than most."""
        self._group.append(call)
        self._hand_over()

    def _hand_over(self) -> None:
        calls, self._group = self._group, []
        if not calls:
            return
        try:
            self._running.append(self._pool.submit(_all, calls))
        except RuntimeError:
            # The interpreter is ending, and takes no more work for threads: a session left open ends here.
            _all(calls)


class AtOnce:
    """What stands for `Uploads` where a place answers at once: each call is done where it is asked for."""

    def run(self, call: Callable[[], object]) -> None:
        """Do the call."""
        call()

    def wait(self) -> None:
        """Nothing is ever on its way."""

    def close(self) -> None:
        """There are no threads."""


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
