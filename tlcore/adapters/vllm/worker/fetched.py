"""Requests whose clients fetch what is captured of them: in which steps that is, and when it is stored."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ....engine.session import Session
from ....record import Json

# More requests, and more flushes, than anybody asks after; the oldest are forgotten.
_MOST_REQUESTS = 4096
_MOST_FLUSHES = 64


class Fetched:
    """The runs and steps of the last requests that are fetched."""

    def __init__(self) -> None:
        self._known: dict[str, Json] = {}

    def note(self, session: Session, requests: Iterable[str]) -> None:
        """The step that has just begun in a session has rows of these requests."""
        for request in requests:
            known = self._known.get(request)
            if known is None or known["run_id"] != session.run_id:
                known = {"run_id": session.run_id, "url": session.url, "steps": []}
                self._known.pop(request, None)
                self._known[request] = known
                if len(self._known) > _MOST_REQUESTS:
                    del self._known[next(iter(self._known))]
            known["steps"].append(session.step)

    def of(self, requests: Iterable[str]) -> dict[str, Json]:
        """For each of these requests that is known, ``run_id``, ``url`` and ``steps``."""
        return {each: self._known[each] for each in requests if each in self._known}


class Flushes:
    """The flushes that were asked for, by the tickets of whoever asked."""

    def __init__(self) -> None:
        self._known: dict[str, threading.Event | None] = {}

    def done(self, ticket: str, session: Session | None) -> bool:
        """Whether the ticket's flush is over; one that is new begins."""
        if ticket not in self._known:
            self._known[ticket] = None if session is None else session.flush_soon()
            if len(self._known) > _MOST_FLUSHES:
                del self._known[next(iter(self._known))]
        event = self._known[ticket]
        return event is None or event.is_set()
