"""Files that are written in a thread of their own, while whoever writes them gets together what follows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress

from tlcore.storage import Appending, Buffer, SupportsAppend


class WritesBehind:
    """The files of ``store``, whose writes one after the other are done by ``pool``.

    A call returns when the write before it is done, and raises what went wrong there. What is written must
    stay as it is until then.
    """

    def __init__(self, store: SupportsAppend, pool: Executor) -> None:
        self._store, self._pool = store, pool

    def begin(self, name: str, reserve: int) -> Appending:
        """A blob to be written behind ``reserve`` bytes, published as ``name``. Raises BackendError."""
        return _File(self._store.begin(name, reserve), self._pool)


class _File:
    def __init__(self, file: Appending, pool: Executor) -> None:
        self._file, self._pool = file, pool
        self._running: Future[int] | None = None

    @property
    def target(self) -> str:
        return self._file.target

    def write(self, parts: Sequence[Buffer]) -> int:
        self._wait()
        self._running = self._pool.submit(self._file.write, parts)
        return sum(memoryview(part).nbytes for part in parts)

    def publish(self, head: bytes = b"") -> None:
        self._wait()
        self._file.publish(head)

    def abandon(self) -> None:
        with suppress(Exception):
            self._wait()
        self._file.abandon()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()
