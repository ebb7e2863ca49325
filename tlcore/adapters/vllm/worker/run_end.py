"""The runs of one worker: how the last of them ended, and what they counted together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from ....engine.session import Session
from ....errors import TlcoreError, shareable
from ....ledger import LEDGER_COLUMNS
from ....record import Json

log = logging.getLogger("vllm.tlcore")
_REMEMBERED = 16


class Runs:
    """The last runs, and the counters of all, since Prometheus expects counters to grow.

    Looked at from other threads than the one that adds.
    """

    def __init__(self) -> None:
        self._all: tuple[Mapping[str, float], tuple[RunEnd, ...]] = ({}, ())

    @property
    def last(self) -> RunEnd | None:
        """The run that began last."""
        runs = self._all[1]
        return runs[-1] if runs else None

    def add(self, session: Session) -> None:
        """A run begins."""
        before, runs = self._all
        if len(runs) == _REMEMBERED:
            before, runs = _sum(before, runs[0].figures()), runs[1:]
        self._all = before, (*runs, RunEnd(session))

    def find(self, run_id: str) -> RunEnd | None:
        """One of the last runs."""
        return next((end for end in self._all[1] if end.run_id == run_id), None)

    def figures(self) -> dict[str, float]:
        """The counters, over all runs."""
        total, runs = self._all
        for end in runs:
            total = _sum(total, end.figures())
        return dict(total)

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait to be stored."""
        return sum(end.queue_bytes for end in self._all[1])


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


class RunEnd:
    """Closes a session once, whoever asks first; its errors are logged, since shutdown must go on."""

    def __init__(self, session: Session) -> None:
        self.run_id = session.run_id
        # Taken off once it is closed, since it holds the run's buffers.
        self._session: Session | None = session
        self._last: tuple[dict[str, float], Json] = ({}, {})
        self._lock = threading.Lock()
        self._problem: str | None = None

    def __call__(self) -> None:
        """Close the session, unless that has been done."""
        with self._lock:
            session = self._session
            if session is not None:
                self._close(session)
                self._last = _figures_of(session), self._document(session)
                self._session = None

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait to be stored."""
        session = self._session
        return 0 if session is None else session.queue_bytes

    def figures(self) -> dict[str, float]:
        """The session's counters, by the names of their metrics."""
        session = self._session
        return self._last[0] if session is None else _figures_of(session)

    def status(self, running: bool) -> Json:
        """The run's state, address, ledger and problems as JSON data."""
        session = self._session
        if session is None:
            return {"state": "closed", **self._last[1]}
        return {"state": "running" if running else "closing", **self._document(session)}

    def _document(self, session: Session) -> Json:
        document: Json = {"run_id": session.run_id, "url": session.url}
        failing, waiting = session.failing, session.waiting
        problem = self._problem or (None if failing is None else shareable(failing))
        if problem is not None:
            document["problem"] = problem
        if waiting is not None:
            document["waiting"] = waiting
        return {**document, "ledger": session.ledger.to_json()}

    def _close(self, session: Session) -> None:
        try:
            session.close()
            log.info("intermediate tensors in %s: %s", session.run.shown_url, session.ledger.to_json())
        except TlcoreError as error:
            self._problem = str(error)
            log.error("the run %s could not be stored whole: %s", session.run.shown_url, error)
        except Exception as error:
            self._problem = f"the run could not be closed: {type(error).__name__}"
            log.exception("the run %s could not be closed", session.run.shown_url)


def _figures_of(session: Session) -> dict[str, float]:
    counts = session.ledger
    return {
        **{f"{name}_tensors": getattr(counts, name) for name in LEDGER_COLUMNS},
        "captured_bytes": counts.bytes_captured,
        "stored_bytes": counts.bytes_stored,
        "blocked_seconds": session.blocked_s,
    }
