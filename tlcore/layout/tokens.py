"""The token ids of requests, as the ``tokens`` of ``step.json`` have them.

An entry has the ids of positions that follow one another (``first_position``, ``ids``) of one request
(``request_id``, and ``sequence`` as in the rows), and where it is known how long its prompt is (``prompt``).
Where draft tokens are among them, ``accepted`` is how many leading ones stayed in the request, or ``drafts``
how many of the last ones nobody decided on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .checks import are_whole, is_whole

TOKENS = "tokens"
Entry = dict[str, Any]


def token_entry(request: str, first: int, ids: Sequence[int], prompt: int | None, **more: Any) -> Entry:
    """An entry; ``rows`` is how many ids it has, until what became of its drafts is noted."""
    known = {} if prompt is None else {"prompt": prompt}
    counted = {"first_position": first, **more, "rows": len(ids)}
    return {"request_id": request, **known, **counted, "ids": list(ids)}


def stored_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Entries as they are stored."""
    return [{key: value for key, value in entry.items() if key != "rows"} for entry in entries]


def checked_tokens(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The entries of a ``step.json``. Raises ValueError, with the damaged part, for any other value."""
    listed = document.get(TOKENS, [])
    if not isinstance(listed, list):
        raise ValueError("tokens are no list")
    for entry in listed:
        if not _is_sound(entry):
            raise ValueError(str(entry)[:200])
        yield entry


def _is_sound(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("request_id"), str)):
        return False
    ids = entry.get("ids")
    numbers = [entry[key] for key in ("prompt", "accepted", "drafts") if key in entry]
    return (
        isinstance(ids, list)
        and are_whole(ids)
        and all(map(is_whole, (entry.get("first_position"), *numbers)))
        and isinstance(entry.get("sequence", ""), str)
    )
