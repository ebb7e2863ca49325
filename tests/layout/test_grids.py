"""Which axis of a tensor is that of a batch's positions: told by its shape, or not told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlcore.layout.grids import UNCLEAR, Grid, as_rows, axis_of
from tlcore.layout.rows import LOGITS, CallRows, RowSet, placed

PROMPT = Grid(3, 7, 7)
CHUNK = Grid(3, 4, 9)
DECODE = Grid(3, 1, 9)
ALONE = Grid(1, 7, 7)


@pytest.mark.parametrize(
    ("grid", "shape", "axis"),
    [
        (PROMPT, (3, 7, 32), 1),
        (PROMPT, (3, 7, 4, 8), 1),
        (PROMPT, (3, 4, 7, 8), 2),
        (PROMPT, (21, 32), 0),
        (PROMPT, (3, 7), 1),
        (PROMPT, (3, 7, 7), 1),
        (CHUNK, (3, 4, 32), 1),
        (CHUNK, (3, 2, 4, 8), 2),
        (CHUNK, (12, 32), 0),
        (DECODE, (3, 1, 32), 1),
        (DECODE, (3, 4, 1, 8), 2),
        (DECODE, (3, 32), 0),
        (ALONE, (1, 7, 32), 1),
        (ALONE, (7, 32), 0),
        (ALONE, (7,), 0),
    ],
)
def test_the_axis_of_positions(grid: Grid, shape: tuple[int, ...], axis: int) -> None:
    assert axis_of(shape, False, grid) == axis


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (PROMPT, (3, 1, 7, 7)),
        (PROMPT, (3, 7, 7, 8)),
        (PROMPT, (3, 4, 7, 7)),
        (PROMPT, (1, 7, 8)),
        (PROMPT, (7,)),
        (CHUNK, (3, 4, 9, 8)),
        (CHUNK, (3, 4, 4, 8)),
        (DECODE, (3, 4, 9, 8)),
        (DECODE, (3, 1, 1, 9)),
        (DECODE, (3, 9)),
        (DECODE, (1, 1, 8)),
        (ALONE, (7, 7)),
        (Grid(3, 7, 7, weights=(7,)), (3, 7)),
        (Grid(3, 7, 7, weights=(21,)), (21, 32)),
        (Grid(3, 7, 7, channels=True), (3, 7, 7)),
    ],
    ids=[
        "mask", "heads", "attention", "cosines", "one for all", "cache", "square", "cache of one",
        "mask of one", "flat mask", "cosines of one", "square alone", "pooled", "a weight", "channels",
    ],
)  # fmt: skip
def test_what_may_be_something_else_is_not_told(grid: Grid, shape: tuple[int, ...]) -> None:
    assert axis_of(shape, False, grid) == UNCLEAR


@pytest.mark.parametrize(
    "shape", [(), (3,), (3, 32), (2, 7, 32), (3, 8, 32), (7, 3, 32), (12, 7, 8), (3, 32, 7)]
)
def test_other_tensors_are_not_of_the_batch(shape: tuple[int, ...]) -> None:
    assert axis_of(shape, False, PROMPT) is None


def test_channels_before_positions_are_told_where_the_model_has_them() -> None:
    assert axis_of((3, 32, 7), False, Grid(3, 7, 7, channels=True)) == 2


def _entry(request: str, first: int, rows: int, position: int) -> dict[str, Any]:
    return {"request_id": request, "first_row": first, "rows": rows, "first_position": position}


def test_rows_are_the_same_values_wherever_the_axis_lies() -> None:
    states = torch.arange(3 * 7 * 4 * 8).reshape(3, 7, 4, 8)
    rows = as_rows(states, 1)
    assert torch.equal(as_rows(states.transpose(1, 2), 2), rows)
    assert torch.equal(rows[7 + 3], states[1, 3])


def test_logits_of_the_last_positions_have_a_set_of_their_own() -> None:
    tokens = RowSet("tokens", [_entry("a", 2, 5, 0)], grid=PROMPT)
    last = RowSet(LOGITS, [_entry("a", 0, 1, 4)], grid=Grid(3, 1, 7))
    assert placed((3, 1, 64), False, [tokens, last])[:2] == (last, 1)
    assert placed((3, 7), True, [tokens, last])[:2] == (tokens, 1)
    assert placed((3, 1, 7, 7), False, [tokens, last]).rows is None


def test_two_sets_of_one_shape_with_other_owners_tell_nothing() -> None:
    one = RowSet("tokens", [_entry("a", 0, 3, 0)], grid=Grid(2, 4, 4))
    other = RowSet("tokens", [{**_entry("a", 0, 4, 0), "sequence": "encoder"}], grid=Grid(2, 4, 4))
    found = placed((2, 4, 8), False, [one, other])
    assert found.rows is None and found.fits


def _document(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    grid = {"samples": 2, "length": 4, "keys": 4}
    entry = {"calls": ["l", "l_3"], "sets": [{"kind": "tokens", "rows": rows, "grid": grid}], **more}
    return {"call_rows": [entry]}


def _record(call: str, *shape: int) -> dict[str, Any]:
    return {"name": f"step_0/{call}/outputs_cpu", "shape": list(shape), "dtype": "float32", "call": 3}


def test_a_document_with_padding_between_rows() -> None:
    rows = CallRows(_document([_entry("a", 1, 3, 0), _entry("b", 4, 2, 7)], indices=[0, 1]))
    spans = rows.spans(_record("l", 2, 4, 8))
    assert [(span.begin, span.length, span.first, span.axis) for span in spans] == [
        (1, 3, 0, 1),
        (4, 2, 7, 1),
    ]
    assert rows.index(_record("l_3", 2, 4, 8)) == 1 and rows.index(_record("other", 2, 4, 8)) == 3
    assert rows.spans(_record("other", 2, 4, 8)) == ()


def test_a_shape_that_was_stored_whole_belongs_to_nobody() -> None:
    assert CallRows(_document([_entry("a", 0, 2, 0)], whole=[[2, 4, 8]])).spans(_record("l", 2, 4, 8)) == ()


@pytest.mark.parametrize(
    "rows",
    [[_entry("a", 2, 3, 0), _entry("b", 4, 2, 0)], [_entry("a", 6, 3, 0)]],
    ids=["overlap", "too many"],
)
def test_damaged_rows_are_an_error(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"first_row|9 rows in Grid"):
        CallRows(_document(rows))
