"""The ledger: what became of every captured tensor, and each reason why one was not stored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .layout.templates import Json


@dataclass(slots=True)
class Counts:
    """One ledger: ``captured == stored + skipped + dropped + failed``, with reasons and bytes."""

    captured: int = 0
    stored: int = 0
    skipped: int = 0
    dropped: int = 0
    failed: int = 0
    bytes_captured: int = 0
    bytes_stored: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add another ledger to this one."""
        for name in (*LEDGER_COLUMNS, "bytes_captured", "bytes_stored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)

    def subtract(self, other: Counts) -> None:
        """Take another ledger, which is part of this one, out of it."""
        for name in (*LEDGER_COLUMNS, "bytes_captured", "bytes_stored"):
            setattr(self, name, getattr(self, name) - getattr(other, name))
        # Without those that are 0 now.
        self.reasons = self.reasons - other.reasons

    @property
    def balanced(self) -> bool:
        """Whether every captured tensor is in exactly one column."""
        return self.captured == self.stored + self.skipped + self.dropped + self.failed

    def to_json(self) -> Json:
        """The ledger as it stands in ``step.json`` and ``run.json``."""
        return {
            **{name: getattr(self, name) for name in LEDGER_COLUMNS},
            "bytes_captured": self.bytes_captured,
            "bytes_stored": self.bytes_stored,
            "reasons": dict(sorted(self.reasons.items())),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Counts:
        """The ledger of a ``step.json`` or ``run.json``."""
        columns = (*LEDGER_COLUMNS, "bytes_captured", "bytes_stored")
        numbers = {name: int(document.get(name, 0)) for name in columns}
        return cls(**numbers, reasons=Counter(document.get("reasons", {})))


LEDGER_COLUMNS = ("captured", "stored", "skipped", "dropped", "failed")


class Ledger:
    """The run's counts, safe to read from any thread while the run goes on."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = threading.Lock()

    def add(self, counts: Counts) -> None:
        """Book a step's counts."""
        with self._lock:
            self._counts.add(counts)

    def snapshot(self) -> Counts:
        """A copy of the counts as they stand."""
        copy = Counts()
        with self._lock:
            copy.add(self._counts)
        return copy


class Outcome(NamedTuple):
    """Why a tensor is not stored: the ledger's column and the reason; no column for a rejected one."""

    column: Literal["skipped", "dropped", "failed"] | None
    reason: str


QUEUE_FULL = Outcome("dropped", "queue full")
RUN_FULL = Outcome("skipped", "max_run_bytes reached")
FREED = Outcome("skipped", "its memory was freed by the model")
STATISTICS_ONLY = Outcome("skipped", "statistics only")
CHANNELS_ONLY = Outcome("skipped", "channel statistics only")
NO_CHANNELS = Outcome("skipped", "has no channels of real numbers")
FINITE = Outcome("skipped", "no NaN or Inf in it or its call")
NO_GRADIENT = Outcome("skipped", "no gradient came")
GRADIENT_ELSEWHERE = Outcome("skipped", "its gradient came in another thread")
NO_GRADIENT_WANTED = Outcome(None, "requires no gradient")
ROWS_UNKNOWN = Outcome("skipped", "rows of the requests unknown")
