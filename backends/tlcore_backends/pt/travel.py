"""Steps on their way to a remote place: several at a time, each with its end behind its files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tlcore.storage import Store

_THREADS = 16
# Few enough that a place which does not answer keeps nobody waiting for long.
_MOST_STEPS = 8

Stored = Callable[[int, BaseException | None], None]


@dataclass(eq=False)
class TravellingStep:
    """A step of which something travels; ``copies`` follow its files, and ``end`` follows them."""

    number: int
    waiting: int = 0
    copies: list[tuple[str, str]] = field(default_factory=list)
    end: tuple[str, bytes] | None = None
    error: BaseException | None = None


class Travel:
    """Puts the files of steps into ``store``.

    ``stored`` is called, in any thread, once for each step that was committed, ``hold`` with every change of
    the bytes in memory. `room` waits while more than ``most_bytes``, or too many steps, travel.
    """

    def __init__(self, store: Store, most_bytes: int, stored: Stored, hold: Callable[[int], None]) -> None:
        self._store = store
        self._most_bytes = most_bytes
        self._stored = stored
        self._hold = hold
        self._pool = ThreadPoolExecutor(_THREADS, "tlcore-upload")
        self._travelling = 0
        self._calls = 0
        self._committed = 0
        self._changed = threading.Condition()

    def put(self, step: TravellingStep, name: str, data: bytes) -> None:
        """Send a file of a step."""
        with self._changed:
            self._travelling += len(data)
        self._hold(len(data))
        self._send(step, partial(self._store.put, name, [data]), len(data))

    def commit(self, step: TravellingStep, name: str, text: bytes) -> None:
        """Send the step's copies when its files are there, and then its end."""
        with self._changed:
            step.end = name, text
            self._committed += 1
            ready = not step.waiting
        if ready:
            self._go_on(step)

    def room(self) -> None:
        """Return when few enough bytes and steps travel for more to follow."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._travelling <= self._most_bytes and self._committed < _MOST_STEPS
            )

    def wait(self) -> None:
        """Return when nothing travels."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls and not self._committed)

    def close(self) -> None:
        """End the threads, after everything that was sent."""
        self.wait()
        self._pool.shutdown()

    def _send(self, step: TravellingStep, call: Callable[[], object], nbytes: int = 0) -> None:
        with self._changed:
            step.waiting += 1
            self._calls += 1
        work = partial(self._work, step, call, nbytes)
        try:
            self._pool.submit(work)
        except RuntimeError:
            # The interpreter is ending, and takes no more work for threads: a session left open ends here.
            work()

    def _work(self, step: TravellingStep, call: Callable[[], object], nbytes: int) -> None:
        try:
            # Nobody wants the rest of a step that has failed.
            if step.error is None:
                call()
        except BaseException as error:
            step.error = step.error or error
        self._hold(-nbytes)
        with self._changed:
            self._travelling -= nbytes
            step.waiting -= 1
            ready = not step.waiting and step.end is not None
        if ready:
            self._go_on(step)
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()

    def _go_on(self, step: TravellingStep) -> None:
        """What follows when all that was sent of a committed step is there."""
        assert step.end is not None
        if step.copies and step.error is None:
            copies, step.copies = step.copies, []
            with self._changed:
                # Until all are sent, none of them is the last.
                step.waiting += 1
            for source, target in copies:
                self._send(step, partial(self._store.copy, source, target))
            with self._changed:
                step.waiting -= 1
                ready = not step.waiting
            if not ready:
                return
        if step.error is None:
            name, text = step.end
            try:
                self._store.put(name, [text])
            except BaseException as error:
                step.error = error
        self._stored(step.number, step.error)
        with self._changed:
            self._committed -= 1
            self._changed.notify_all()
