"""The contracts a backend fulfils: a `Sink` (a format) over a `Store` (a place)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from .record import Record, RunInfo, StepSummary

Buffer = bytes | bytearray | memoryview


@runtime_checkable
class Sink(Protocol):
    """Turns records into something durable. Built by ``factory(**options)``, used by one thread.

    The calls come in the order ``open``, then for each step any number of ``write`` and one
    ``commit_step``, then ``close``. A step that fails is abandoned: no ``commit_step`` follows, and
    the next ``write`` belongs to a later step. An exception from any call is booked in the ledger and
    never reaches the model.
    """

    def open(self, run: RunInfo) -> None:
        """Prepare the place (write ``run.json``); raises BackendError when it cannot be written."""
        ...

    def write(self, batch: Sequence[Record]) -> None:
        """Take over records of one step; their ``data`` is invalid once this returns."""
        ...

    def commit_step(self, step: StepSummary) -> None:
        """Accept the step. On return it is durable, unless the sink `SupportsLateCommit`."""
        ...

    def close(self) -> None:
        """Finish the run; ``run.ledger`` is final."""
        ...


StepStored = Callable[[int, BaseException | None], None]


@runtime_checkable
class SupportsLateCommit(Protocol):
    """A sink that makes many steps durable together: its `commit_step` returns when a step is accepted.

    The ledger counts such a step as stored, or as failed, when the sink says so. A sink without these
    methods has made each step durable when `commit_step` returns.
    """

    def tell_stored(self, stored: StepStored) -> None:
        """Called once, before the first `Sink.write`.

        ``stored(step, error)`` is to be called for each step that was accepted, in any thread: with None
        once it is durable, else with what prevented it; for all of them before `Sink.close` returns.
        """
        ...

    def flush(self) -> None:
        """Return when every step accepted so far is durable or has failed."""
        ...


class Entry(NamedTuple):
    """One stored blob: its name relative to the store's root, and its size in bytes."""

    name: str
    size: int


class Store(Protocol):
    """Named blobs under one root (a run's directory). Names are relative, ``/``-separated.

    Publication is atomic: a reader sees a whole blob or none. Methods raise FileNotFoundError for a
    missing name and BackendError (redacted) for everything a place can refuse. Safe to call from
    several threads.
    """

    @property
    def url(self) -> str:
        """The root, redacted, for messages."""
        ...

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Publish the concatenation of ``parts``; returns its size once it is stored."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source`` in the cheapest way (hard link, server copy)."""
        ...

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a blob, all of it by default."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All blobs whose name starts with ``prefix``, in any order; unfinished ones are not listed."""
        ...

    def delete(self, name: str) -> None:
        """Remove a blob; a missing one is not an error."""
        ...

    def close(self) -> None:
        """Release connections and handles."""
        ...
