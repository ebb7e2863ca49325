"""A step that is written in a thread of its own, while the next is read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .travel import Stored


class Behind:
    """Writes one step at a time; ``stored`` is called there, once for each."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._pool = ThreadPoolExecutor(1, "tlcore-write")
        self._running: Future[None] | None = None

    def write(self, step: int, finish: Callable[[], None]) -> None:
        """Begin to write a step, by ``finish``, once the one before is written."""
        self.wait()
        try:
            self._running = self._pool.submit(self._work, step, finish)
        except RuntimeError:
            # The interpreter is ending, and takes no more work for threads: a session left open ends here.
            self._work(step, finish)

    def _work(self, step: int, finish: Callable[[], None]) -> None:
        try:
            finish()
        except Exception as error:
            self._stored(step, error)
        else:
            self._stored(step, None)

    def wait(self) -> None:
        """Return when nothing is being written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread."""
        self.wait()
        self._pool.shutdown()
