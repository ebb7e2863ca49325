"""A step is booked once, as stored or as failed, however late and in whichever thread that is known."""

from __future__ import annotations

import threading
from collections import Counter

from tlcore.engine.pipeline.booking import DESCRIBED, Booking
from tlcore.errors import BackendError
from tlcore.ledger import Counts, Ledger


def counts(stored: int = 3) -> Counts:
    return Counts(
        captured=stored + 2, stored=stored, skipped=2, bytes_stored=7, reasons=Counter({DESCRIBED: 1})
    )


def test_a_step_counts_when_it_is_decided_and_only_once() -> None:
    ledger = Ledger()
    booking = Booking(ledger)
    booking.accept(0, counts())
    assert ledger.snapshot() == Counts()
    booking.decide(0, None)
    booking.decide(0, BackendError("too late"))
    booking.decide(1, None)
    assert ledger.snapshot() == counts()
    assert booking.failing is None and booking.first_error is None


def test_a_step_that_fails_later_has_its_tensors_in_failed() -> None:
    ledger = Ledger()
    booking = Booking(ledger)
    booking.accept(0, counts())
    error = BackendError("no room")
    booking.decide(0, error)
    found = ledger.snapshot()
    assert (found.captured, found.stored, found.skipped, found.failed, found.bytes_stored) == (5, 0, 1, 4, 0)
    assert found.balanced and found.reasons["failed: BackendError"] == 4
    assert booking.failing is error
    booking.book(1, counts(), None)
    assert booking.failing is None and booking.first_error is error


def test_what_a_sink_forgets_counts_as_failed() -> None:
    ledger = Ledger()
    booking = Booking(ledger)
    booking.accept(0, counts())
    booking.close()
    assert ledger.snapshot().failed == 4 and ledger.snapshot().balanced


def test_many_threads_book_every_step() -> None:
    ledger = Ledger()
    booking = Booking(ledger)
    for number in range(400):
        booking.accept(number, counts())

    def decide(begin: int) -> None:
        for number in range(begin, 400, 2):
            booking.decide(number, None)

    threads = [threading.Thread(target=decide, args=(begin % 2,)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert ledger.snapshot().captured == 2000
