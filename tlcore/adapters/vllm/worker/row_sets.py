"""The row sets of a step's parts, made of the rows of its tokens."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from ....layout.rows import ANY, Row, RowSet
from ....record import Json

Sets = Sequence[RowSet]


def token_set(
    rows: Sequence[Row],
    padded: int = 0,
    planes: Sequence[int] = (),
    encoded: int = 0,
    batched: bool = False,
) -> RowSet:
    """The rows of a step's tokens, and ``padded`` ones behind them.

    Some models' states have an axis before that of tokens, whose lengths are the ``planes``, and a decoder is
    given ``encoded`` states of an encoder's. Where there are as many tokens, nobody can tell which is which.
    Modules of transformers have them ``batched``.
    """
    made = RowSet("tokens", rows, padded, batched=batched)
    doubtful: list[tuple[int, ...]] = [
        (each, tokens, ANY) for each in planes if each in made.lengths for tokens in made.lengths
    ]
    if encoded in made.lengths:
        doubtful += [(encoded, *[ANY] * more) for more in range(1, 4)]
    return replace(made, single=tuple(dict.fromkeys(doubtful))) if doubtful else made


def sampled(rows: Sequence[Row], cut_short: Container[str] = ()) -> RowSet:
    """The rows that tokens are sampled from: each request's last, and those of its draft tokens but one.

    Of requests that are ``cut_short`` it is the end of a chunk, and vLLM throws away what it samples there.
    """
    found: list[Json] = []
    first = 0
    for row in rows:
        if "drafts" not in row and row["request_id"] not in cut_short:
            found.append(rows_of(row, first, 1, row["first_position"] + row["rows"] - 1))
            first += 1
            continue
        count = 1 + int(row.get("drafts", 0))
        skipped = row["rows"] - count
        more = {"drafts": row.get("drafts"), "unsampled": row["request_id"] in cut_short or None}
        found.append(rows_of(row, first, count, row["first_position"] + skipped, **more))
        first += count
    return RowSet("sampled", found)


def pooled(rows: Sequence[Row], cut_short: Container[str], first: bool = False) -> RowSet:
    """A row for each request, as poolers take it: its last one or what is made of all, or its ``first``."""
    ends = [row["first_position"] + (0 if first else row["rows"] - 1) for row in rows]
    return RowSet(
        "requests",
        [
            rows_of(row, i, 1, end, unsampled=row["request_id"] in cut_short or None)
            for i, (row, end) in enumerate(zip(rows, ends, strict=True))
        ],
        vectors=True,
    )


def rows_of(row: Row, first: int, count: int, position: int, **more: int | None) -> Json:
    """Some other rows of a row's request."""
    found: Json = {"request_id": row["request_id"]} if "request_id" in row else {}
    if "external_request_id" in row:
        found["external_request_id"] = row["external_request_id"]
    found["first_row"], found["rows"], found["first_position"] = first, count, position
    for key, value in more.items():
        if value is not None:
            found[key] = value
    return found


def where(rows: Sequence[Row], chosen: Sequence[bool]) -> list[Json]:
    """The rows that are chosen, one after the other: an entry for each run of them."""
    found: list[Json] = []
    first = 0
    for row in rows:
        begin = row["first_row"]
        for place in range(begin, begin + row["rows"]):
            if not chosen[place]:
                continue
            if found and place > begin and chosen[place - 1]:
                found[-1]["rows"] += 1
            else:
                found.append(rows_of(row, first, 1, row["first_position"] + place - begin))
            first += 1
    return found
