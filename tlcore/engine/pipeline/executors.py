"""Who runs the processor: the model's own thread, or one in the background."""

from __future__ import annotations

import queue
import threading
import time

from ..batch import Batch, StepEnd
from .processor import Processor

# While every step fails, at most so many items wait, and a close goes on trying for so long.
_MOST_WAITING = 2000
_CLOSE_S = 60.0


class InlineExecutor:
    """Runs the processor in the caller's thread: simple to debug, and the model waits."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def submit(self, item: Batch | StepEnd) -> None:
        """Process the item before returning."""
        if isinstance(item, Batch):
            self._processor.batch(item)
        else:
            self._processor.end_step(item)

    def flush(self) -> None:
        """Have the sink store what it has accepted."""
        self._processor.flush()

    def settle(self) -> threading.Event:
        """The same; the event is set."""
        self.flush()
        done = threading.Event()
        done.set()
        return done

    def close(self) -> None:
        """Close the processor."""
        self._processor.close()


class ThreadExecutor:
    """Runs the processor on one background thread; the order of items is kept."""

    def __init__(self, processor: Processor) -> None:
        processor.catches = BaseException
        self._processor = processor
        self._items: queue.SimpleQueue[Batch | StepEnd | threading.Event | None] = queue.SimpleQueue()
        self._closed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="tlcore-pipeline", daemon=True)
        self._thread.start()

    def submit(self, item: Batch | StepEnd) -> None:
        """Hand the item over; never waits (memory is bounded where it is acquired)."""
        self._items.put(item)

    def flush(self) -> None:
        """Wait until everything submitted so far is stored or booked."""
        done = threading.Event()
        self._items.put(done)
        while not done.wait(0.5):
            if not self._thread.is_alive():
                return

    def settle(self) -> threading.Event:
        """Have everything submitted so far stored soon; does not wait. The event is set once it is."""
        done = threading.Event()
        self._items.put(done)
        return done

    def close(self) -> None:
        """Finish everything submitted, close the processor, end the thread.

        A sink that works gets all the time it needs; one that fails is tried for a minute.
        """
        self._closed_at = time.monotonic()
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                self._processor.flush()
                item.set()
            elif isinstance(item, Batch):
                self._processor.batch(item, self._hopeless)
            else:
                self._processor.end_step(item, self._hopeless)
            del item
        self._processor.close()

    @property
    def _hopeless(self) -> bool:
        """Whether to fail what waits untried: each try may last minutes, and more comes meanwhile."""
        if self._processor.failing is None:
            return False
        closing = self._closed_at is not None and time.monotonic() - self._closed_at > _CLOSE_S
        return closing or self._items.qsize() > _MOST_WAITING
