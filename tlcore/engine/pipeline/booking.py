"""Each step's way into the ledger: as stored or as failed, once, in whichever thread that becomes known."""

from __future__ import annotations

import logging
import threading
import time

from ...ledger import STATISTICS_ONLY, Counts, Ledger

log = logging.getLogger("tlcore")
# Two faults nearer to each other than this are told as one.
_QUIET_S = 60.0
DESCRIBED = f"{STATISTICS_ONLY.column}: {STATISTICS_ONLY.reason}"


class Booking:
    """Books steps in ``ledger``; safe to use from several threads.

    ``failing`` is why the last step failed, None once a step's tensors are stored again; ``first_error``
    is the first such reason.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._accepted: dict[int, Counts] = {}
        self._lock = threading.Lock()
        self._told = -_QUIET_S
        self.first_error: BaseException | None = None
        self.failing: BaseException | None = None

    def accept(self, number: int, counts: Counts) -> None:
        """Remember a step that its sink is about to accept; `decide` is to follow."""
        with self._lock:
            self._accepted[number] = counts

    def withdraw(self, number: int) -> None:
        """Forget a step that its sink did not accept after all."""
        with self._lock:
            self._accepted.pop(number, None)

    def decide(self, number: int, error: BaseException | None) -> None:
        """Book an accepted step: as stored, or as failed with ``error``. Only the first call counts."""
        with self._lock:
            counts = self._accepted.pop(number, None)
            if counts is not None:
                self._book(number, counts, error)

    def book(self, number: int, counts: Counts, error: BaseException | None) -> None:
        """Book a step that never had to wait."""
        with self._lock:
            self._book(number, counts, error)

    def close(self) -> None:
        """Book what was accepted and never decided as failed."""
        for number in sorted(self._accepted):
            self.decide(number, RuntimeError("the sink never said whether the step is stored"))

    def _book(self, number: int, counts: Counts, error: BaseException | None) -> None:
        if error is not None:
            _fail(counts, error)
            self._note(number, error)
        elif counts.stored or DESCRIBED in counts.reasons:
            self.failing = None
        self._ledger.add(counts)

    def _note(self, number: int, error: BaseException) -> None:
        first, self.failing = self.failing is None, error
        self.first_error = self.first_error or error
        now = time.monotonic()
        if first and now - self._told >= _QUIET_S:
            log.warning(
                "step %d could not be stored and counts as failed; further failures are only counted: %s",
                number,
                error,
            )
        if first:
            self._told = now


def _fail(counts: Counts, error: BaseException) -> None:
    """Turn what was to be stored into failed."""
    staged = counts.captured - counts.skipped - counts.dropped - counts.failed
    counts.stored = counts.bytes_stored = 0
    # Statistics that nobody can read are lost, like the bytes of a tensor.
    described = counts.reasons.pop(DESCRIBED, 0)
    counts.skipped -= described
    staged += described
    counts.failed += staged
    counts.reasons[f"failed: {type(error).__name__}"] += staged
