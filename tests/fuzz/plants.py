"""Faults in the rows of a step that a test of whose rows are whose must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def swapped(rows: Rows) -> None:
    """Two requests have each other's rows."""
    if len(rows) > 1:
        for key in ("request_id", "external_request_id"):
            rows[0][key], rows[-1][key] = rows[-1][key], rows[0][key]


def later(rows: Rows) -> None:
    """The last request's rows are said to be a position later."""
    rows[-1]["first_position"] += 1


def earlier(rows: Rows) -> None:
    """The first request's rows are said to be a position earlier."""
    rows[0]["first_position"] = max(0, rows[0]["first_position"] - 1)


def longer(rows: Rows) -> None:
    """The first request has a row of the second."""
    if len(rows) > 1:
        rows[0]["rows"] += 1
        rows[1]["first_row"] += 1
        rows[1]["rows"] -= 1


def believed(rows: Rows) -> None:
    """No row is of a draft token."""
    for row in rows:
        row["drafts"] = 0


PLANTS: dict[str, Callable[[Rows], None]] = {
    "swapped": swapped,
    "later": later,
    "earlier": earlier,
    "longer": longer,
    "believed": believed,
}
