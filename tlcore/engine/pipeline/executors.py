"""Who runs the processor: the model's own thread, or one in the background."""

from __future__ import annotations

import queue
import threading
import time

from ..batch import Batch, StepEnd
from ..staging.host_memory import HostPool
from .cpus import unbound
from .processor import Processor

# While every step fails, at most so many items wait, and a close goes on trying for so long.
_MOST_WAITING = 2000
_CLOSE_S = 60.0
# After a small step the thread rests for so long, and then finds several: each time it is woken its code has
# left the processor's caches, and it is the model that waits for the interpreter meanwhile. On loaded
# processors steps of 10 ms took 1 ms longer instead of 4, with 0.17 ms of the thread's time instead of 0.35.
_REST_S = 0.1
_MOST_SMALL_TENSORS, _MOST_SMALL_BYTES = 256, 2 << 20
# Memory must not run short meanwhile: so many chunks there must be, of which so many may be in use.
_CHUNKS_TO_REST, _SHARE_IN_USE = 8, 4


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

    def __init__(self, processor: Processor, pool: HostPool) -> None:
        processor.catches = BaseException
        self._processor = processor
        self._pool = pool
        self._may_rest = not pool.drops and pool.limit >= _CHUNKS_TO_REST * pool.chunk_bytes
        self._hurry = threading.Event()
        pool.on_wait = self._hurry.set
        self._tensors = self._bytes = 0
        self._items: queue.SimpleQueue[tuple[Batch | StepEnd, ...] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        # All of a step that has not ended yet.
        self._waiting: Batch | None = None
        self._closed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="tlcore-pipeline", daemon=True)
        with unbound():
            self._thread.start()

    def submit(self, item: Batch | StepEnd) -> None:
        """Hand the item over; never waits (memory is bounded where it is acquired).

        All of a step goes together with its end: each time the thread is woken, the model waits.
        """
        before = () if self._waiting is None else (self._waiting,)
        self._waiting = item if isinstance(item, Batch) and item.is_whole_step else None
        together = before if self._waiting is not None else (*before, item)
        if together:
            self._items.put(together)
        if isinstance(item, Batch) and len(item.memory) > 1:
            self._hurry.set()

    def flush(self) -> None:
        """Wait until everything submitted so far is stored or booked."""
        done = self.settle()
        while not done.wait(0.5):
            if not self._thread.is_alive():
                return

    def settle(self) -> threading.Event:
        """Have everything submitted so far stored soon; does not wait. The event is set once it is."""
        done = threading.Event()
        self._items.put(done)
        self._hurry.set()
        return done

    def close(self) -> None:
        """Finish everything submitted, close the processor, end the thread.

        A sink that works gets all the time it needs; one that fails is tried for a minute.
        """
        self._closed_at = time.monotonic()
        if self._waiting is not None:
            # Its end never came.
            self._items.put((self._waiting,))
        self._items.put(None)
        self._hurry.set()
        self._thread.join()

    def _run(self) -> None:
        while (items := self._items.get()) is not None:
            if isinstance(items, threading.Event):
                self._processor.flush()
                items.set()
            else:
                for item in items:
                    self._process(item)
                    del item
            del items
        self._processor.close()

    def _process(self, item: Batch | StepEnd) -> None:
        if isinstance(item, Batch):
            self._tensors += len(item.specs)
            if self._tensors <= _MOST_SMALL_TENSORS:
                self._bytes += sum(spec.nbytes for spec in item.specs)
            self._processor.batch(item, self._hopeless)
        else:
            self._processor.end_step(item, self._hopeless)
            self._rest()

    def _rest(self) -> None:
        """After a small step, wait for some more to come, unless somebody waits for those that are here."""
        small = self._tensors <= _MOST_SMALL_TENSORS and self._bytes <= _MOST_SMALL_BYTES
        self._tensors = self._bytes = 0
        if small and self._may_rest and self._items.empty() and self._has_memory:
            self._hurry.wait(_REST_S)
        self._hurry.clear()

    @property
    def _has_memory(self) -> bool:
        return self._pool.in_flight * _SHARE_IN_USE <= self._pool.limit

    @property
    def _hopeless(self) -> bool:
        """Whether to fail what waits untried: each try may last minutes, and more comes meanwhile."""
        if self._processor.failing is None:
            return False
        closing = self._closed_at is not None and time.monotonic() - self._closed_at > _CLOSE_S
        return closing or self._items.qsize() > _MOST_WAITING
