"""Whose row is whose in a step's tensors: one rule for capture, for the reader and for comparisons.

Whoever runs a step says which rows the tensors of a call have: one *row set*, or several that differ in
length (images, and the tokens that stand for them). Only the number of rows of a tensor then chooses
among the sets of its own call. What no set of the call describes belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Span(NamedTuple):
    """``length`` rows of a tensor from row ``begin`` on, which belong to ``row``'s request.

    They are its positions from ``first`` on; None where rows have an owner but no position in it.
    """

    row: Row
    begin: int
    length: int
    first: int | None

    def kept(self) -> Span:
        """The leading rows whose tokens stayed in the request: draft tokens may have been rejected.

        Where only the last row is wanted, it is that which the last of these tokens was sampled from.
        """
        accepted, last = self.row.get("accepted"), self.row.get("last")
        if accepted is None:
            accepted = self.length - int(self.row.get("drafts", 0))
        kept = max(0, min(self.length, accepted))
        if last is None or last >= kept:
            return self._replace(length=kept)
        return self._replace(
            begin=self.begin + last, length=1, first=None if self.first is None else self.first + last
        )


@dataclass(frozen=True)
class RowSet:
    """The rows that tensors of one length have, and ``padded`` meaningless ones that may follow them.

    ``rows`` are entries as in ``step.json``, one after the other: ``request_id``, ``first_row``, ``rows``
    (how many), ``first_position``, and more that is known of the request. ``kind`` says what a row is.
    """

    kind: str
    rows: Sequence[Row]
    padded: int = 0

    @cached_property
    def length(self) -> int:
        """The number of rows, without padding."""
        return sum(row["rows"] for row in self.rows)

    @property
    def lengths(self) -> tuple[int, int]:
        """How many rows a tensor of this set can have."""
        return self.length, self.length + self.padded

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The rows of each entry."""
        return tuple(
            Span(row, row["first_row"], row["rows"], row.get("first_position"))
            for row in self.rows
            if row["rows"]
        )


# What is known of a request's rows only when its draft tokens are decided on.
DECIDED = ("accepted", "last")
NO_ROWS: tuple[RowSet, ...] = ()


def row_set_of(shape: Sequence[int], whole_numbers: bool, sets: Iterable[RowSet]) -> RowSet | None:
    """The one of a call's row sets that a tensor of this shape has; None where that is not certain."""
    if not shape:
        return None
    fitting = [each for each in sets if each.length and shape[0] in each.lengths]
    if not fitting or any(each.spans != fitting[0].spans for each in fitting[1:]):
        return None
    if len(shape) == 2 and whole_numbers and shape[0] != 1 and shape[1] in fitting[0].lengths:
        # Multimodal positions are (3, tokens): where the tokens are three, too, nobody can tell.
        return None
    return fitting[0]


def is_whole_numbers(dtype: str) -> bool:
    """Whether a dtype, with or without ``torch.``, is of integers or truth values."""
    return dtype.removeprefix("torch.").startswith(("int", "uint", "bool"))


class CallRows:
    """The row sets of each call of one step and rank, as its ``step.json`` has them."""

    def __init__(self, document: Mapping[str, Any], accepted: Mapping[str, Row] | None = None) -> None:
        """``accepted`` is what other ranks know of the requests' accepted rows: `DECIDED` keys.

        Raises ValueError, with the damaged part, where the rows do not follow one another.
        """
        known = accepted or {}
        rows = [_with_accepted(row, known) for row in document.get("rows") or ()]
        self._others = (
            (_checked(RowSet("tokens", rows, int(document.get("padded_rows", 0)))),) if rows else NO_ROWS
        )
        self._listed: dict[str, tuple[RowSet, ...]] = {}
        try:
            for entry in document.get("call_rows") or ():
                sets = tuple(map(_row_set, entry["sets"]))
                self._listed.update(dict.fromkeys(entry["calls"], sets))
        except (TypeError, KeyError) as error:
            raise ValueError(f"call_rows: {type(error).__name__}: {error}") from None

    def sets(self, call: str) -> tuple[RowSet, ...]:
        """The row sets of a call, by its directory."""
        return self._listed.get(call, self._others)

    def spans(self, record: Mapping[str, Any]) -> tuple[Span, ...]:
        """Whose the rows of a record's tensor are; nothing where that is not known."""
        call = str(record["name"]).split("/")[1]
        found = row_set_of(record["shape"], is_whole_numbers(str(record["dtype"])), self.sets(call))
        return () if found is None else found.spans


def _row_set(entry: Any) -> RowSet:
    return _checked(RowSet(str(entry["kind"]), entry["rows"], int(entry.get("padded_rows", 0))))


def _with_accepted(row: Row, known: Mapping[str, Row]) -> Row:
    decided = known.get(str(row.get("request_id")), {})
    return row if "accepted" in row or not decided else {**row, **decided}


def _checked(rows: RowSet) -> RowSet:
    expected = 0
    for row in rows.rows:
        numbers = [row.get(key) for key in ("first_row", "rows")]
        numbers += [
            row[key] for key in ("first_position", "accepted", "drafts", "last") if row.get(key) is not None
        ]
        sound = isinstance(row.get("request_id"), str) and all(type(n) is int and n >= 0 for n in numbers)
        if not sound or numbers[0] != expected:
            raise ValueError(str(row)[:200])
        expected += row["rows"]
    return rows


class Decided(NamedTuple):
    """How many of a request's draft tokens were ``kept``, and how many tokens were ``sampled`` for it.

    ``end`` is the request's length with the latter, where it is known.
    """

    kept: int
    sampled: int
    end: int | None = None


def accept(rows: Iterable[Any], document: Mapping[str, Any], decided: Mapping[str, Decided]) -> None:
    """Note in a step's ``rows`` and other row sets how many of each entry's are of tokens that were kept.

    An entry's ``drafts`` are its last rows. Of one that is ``undecided`` only one row is wanted, which
    ``last`` names. One whose accepted rows are known already may still reach beyond its request's end, of
    which rows need ``ahead`` tokens more.
    """
    listed = [each["rows"] for entry in document.get("call_rows", ()) for each in entry["sets"]]
    for row in (row for entries in (rows, *listed) for row in entries):
        drafts, undecided, ahead = row.get("drafts"), row.pop("undecided", False), row.pop("ahead", 0)
        known = decided.get(row["request_id"])
        if "accepted" in row and known is not None and known.end is not None:
            row["accepted"] = max(0, min(row["accepted"], known.end - ahead - row["first_position"]))
        if drafts is None or "accepted" in row or (drafts and known is None):
            continue
        row["accepted"] = row["rows"] - drafts + (0 if known is None else min(drafts, known.kept))
        if undecided and known is not None and known.sampled:
            row["last"] = row["rows"] - drafts + known.sampled - 2
        del row["drafts"]
