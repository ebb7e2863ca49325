"""What became of a step's draft tokens, noted in the rows and ids of their requests once it is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Decided(NamedTuple):
    """How many of a request's draft tokens were ``kept``, and how many tokens were ``sampled`` for it.

    ``end`` is the request's length with the latter, where it is known.
    """

    kept: int
    sampled: int
    end: int | None = None


# What only rows have of which something is decided late.
_UNDECIDED = frozenset(("drafts", "accepted", "undecided", "ahead", "drafts_before"))


def accept(rows: Iterable[Any], document: Mapping[str, Any], decided: Mapping[str, Decided]) -> None:
    """Note in a step's ``rows`` and other row sets how many of each entry's are of tokens that were kept.

    An entry's ``drafts`` are its last rows. Of one that is ``undecided`` only one row is wanted, which
    ``last`` names. One whose accepted rows are known already may still reach beyond its request's end, of
    which rows need ``ahead`` tokens more. ``drafts_before`` are draft tokens whose rows were left out before.
    """
    listed = [each["rows"] for entry in document.get("call_rows", ()) for each in entry["sets"]]
    for row in (row for entries in (rows, *listed) for row in entries):
        if _UNDECIDED.isdisjoint(row):
            continue
        drafts, undecided, ahead = row.get("drafts"), row.pop("undecided", False), row.pop("ahead", 0)
        before = row.pop("drafts_before", 0)
        known = decided.get(row["request_id"])
        if "accepted" in row and known is not None and known.end is not None:
            row["accepted"] = max(0, min(row["accepted"], known.end - ahead - row["first_position"]))
        if drafts is None or "accepted" in row or (drafts and known is None):
            continue
        kept = 0 if known is None else min(drafts, max(0, known.kept - before))
        row["accepted"] = row["rows"] - drafts + kept
        if undecided and known is not None and known.sampled:
            row["last"] = row["rows"] - drafts + known.sampled - 2
        del row["drafts"]
