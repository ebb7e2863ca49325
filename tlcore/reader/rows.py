"""Which rows of a tensor belong to which of a step's requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import ReadError
from ..record import Json


class Span(NamedTuple):
    """``length`` rows of a tensor from row ``begin`` on: positions ``first`` onwards of ``row``'s request."""

    row: Json
    begin: int
    length: int
    first: int


def spans(record: Json, rows: Sequence[Json], padded: int = 0) -> Iterator[Span]:
    """The spans of a record's tensor; none for a tensor without a row for each token or request.

    ``rows`` are those of ``step.json``, ``padded`` is its ``padded_rows``. A tensor with one row for
    each request, such as logits, has the row of each request's last token.
    """
    shape = record["shape"]
    total = _total(rows)
    if not shape or not total:
        return
    lengths = {total, total + padded}
    if shape[0] in lengths:
        for row in rows:
            yield Span(row, row["first_row"], row["rows"], row["first_position"])
    elif shape[0] == len(rows) and not _counts_tokens_second(record, lengths):
        for place, row in enumerate(rows):
            yield Span(row, place, 1, row["first_position"] + row["rows"] - 1)


def _total(rows: Sequence[Json]) -> int:
    """How many token rows there are. Raises ReadError where the rows do not follow one another."""
    expected = 0
    for row in rows:
        numbers = [row.get(key) for key in ("first_row", "rows", "first_position")]
        sound = isinstance(row.get("request_id"), str) and all(type(n) is int and n >= 0 for n in numbers)
        if not sound or numbers[0] != expected:
            raise ReadError(f"damaged rows in step.json: {str(row)[:200]}")
        expected += row["rows"]
    return expected


def _counts_tokens_second(record: Json, lengths: set[int]) -> bool:
    """Whether this is (3, tokens) whole numbers, multimodal positions: the 3 are no requests."""
    shape = record["shape"]
    return len(shape) == 2 and shape[1] in lengths and str(record["dtype"]).startswith("int")
