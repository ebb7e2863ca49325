"""Many small files to a remote store at once; one after the other to the local disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from tlcore.protocols import Buffer, Store

from .stores import LocalStore

_AT_ONCE = 16


class Uploads:
    """Puts and copies into ``store``, of which up to 16 run at the same time; `wait` ends a group."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = None if isinstance(store, LocalStore) else ThreadPoolExecutor(_AT_ONCE, "tlcore-upload")
        self._running: list[Future[object]] = []

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Publish a blob; ``parts`` must stay as they are until `wait` returns."""
        self.run(lambda: self._store.put(name, parts))

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source``, which an earlier group has put."""
        self.run(lambda: self._store.copy(source, target))

    def wait(self) -> None:
        """Return when everything asked for so far is done; raises the first error among it."""
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def delete(self, name: str) -> None:
        """Remove a blob."""
        self.run(lambda: self._store.delete(name))

    def run(self, call: Callable[[], object]) -> None:
        """Do anything else that belongs to the group."""
        if self._pool is None:
            call()
            return
        try:
            self._running.append(self._pool.submit(call))
        except RuntimeError:
            # The interpreter is ending, and takes no more work for threads: a session left open ends here.
            call()
