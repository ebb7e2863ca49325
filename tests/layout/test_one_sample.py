"""Rows of a step's tokens that a model is given as a batch of one sample: told by the shape, or not told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

import tlcore_schemas
from tlcore.engine.filters.rows import StepRows
from tlcore.layout.grids import UNCLEAR, as_rows
from tlcore.layout.one_sample import axis_in_sample
from tlcore.layout.rows import ANY, CallRows, RowSet, placed

SEVERAL, PADDED, ONE, ONE_PADDED = (5, 5), (5, 8), (1, 1), (1, 8)
FLOATS: dict[str, tuple[tuple[int, int], tuple[int, ...], int | None]] = {
    "states": (SEVERAL, (1, 5, 64), 1),
    "states, padded": (PADDED, (1, 8, 64), 1),
    "states without the padding": (PADDED, (1, 5, 64), 1),
    "states of one token": (ONE, (1, 1, 64), 1),
    "states of one token, padded": (ONE_PADDED, (1, 8, 64), 1),
    "heads after the tokens": (SEVERAL, (1, 5, 4, 16), 1),
    "heads before the tokens": (SEVERAL, (1, 4, 5, 16), 2),
    "heads of one token": (ONE, (1, 4, 1, 16), 2),
    "heads after one token": (ONE, (1, 1, 4, 16), 1),
    "heads of one token, padded": (ONE_PADDED, (1, 4, 8, 16), 2),
    "one head of one token, padded": (ONE_PADDED, (1, 1, 8, 16), 2),
    "rows in front": (SEVERAL, (5, 64), 0),
    "rows in front, padded": (PADDED, (8, 64), 0),
    "rows of heads in front": (SEVERAL, (5, 4, 16), 0),
    "one row in front": (ONE, (1, 64), 0),
    "one row in front, padded": (ONE_PADDED, (8, 64), 0),
    "a number for each row": (SEVERAL, (5,), 0),
    "as many heads as tokens": (SEVERAL, (1, 5, 5, 16), UNCLEAR),
    "heads as long as there are tokens": (SEVERAL, (1, 4, 5, 5), UNCLEAR),
    "scores of heads": (SEVERAL, (1, 5, 4, 5), UNCLEAR),
    "tokens behind": (SEVERAL, (1, 4, 16, 5), UNCLEAR),
    "a vector of the sample, or numbers": (SEVERAL, (1, 5), UNCLEAR),
    "the same, padded": (ONE_PADDED, (1, 8), UNCLEAR),
    "heads of one token in front, or not": (ONE, (1, 4, 16), UNCLEAR),
    "one of eight": (ONE_PADDED, (1, 1, 64), UNCLEAR),
    "something else of heads": (ONE, (1, 4, 3, 16), UNCLEAR),
    "cosines of three dimensions": ((3, 3), (3, 1, 3, 16), UNCLEAR),
    "as many planes as tokens": ((4, 4), (4, 1, 4, 64), UNCLEAR),
    "planes": (SEVERAL, (4, 1, 5, 64), None),
    "a vector of the sample": (SEVERAL, (1, 64), None),
    "a vector of the sample, padded": (ONE_PADDED, (1, 64), None),
    "one number": (SEVERAL, (1,), None),
    "other heads": (SEVERAL, (1, 4, 16), None),
    "another length": (PADDED, (1, 6, 64), None),
    "other rows in front": (SEVERAL, (6, 64), None),
    "a scalar": (SEVERAL, (), None),
}
WHOLE: dict[str, tuple[tuple[int, int], tuple[int, ...], int | None]] = {
    "token ids": (SEVERAL, (1, 5), 1),
    "token ids, padded": (ONE_PADDED, (1, 8), 1),
    "one token id": (ONE, (1, 1), 1),
    "experts of one token": (ONE, (1, 2), 0),
    "experts of each token": (SEVERAL, (5, 2), 0),
    "token ids in front": (SEVERAL, (5,), 0),
    "positions of three dimensions": (SEVERAL, (3, 1, 5), None),
    "of as many tokens": ((3, 3), (3, 1, 3), UNCLEAR),
    "experts of one token, padded": (ONE_PADDED, (1, 2), None),
}


@pytest.mark.parametrize(("lengths", "shape", "axis"), FLOATS.values(), ids=FLOATS)
def test_the_axis_of_rows(lengths: tuple[int, int], shape: tuple[int, ...], axis: int | None) -> None:
    assert axis_in_sample(shape, False, lengths) == axis


@pytest.mark.parametrize(("lengths", "shape", "axis"), WHOLE.values(), ids=WHOLE)
def test_the_axis_of_whole_numbers(
    lengths: tuple[int, int], shape: tuple[int, ...], axis: int | None
) -> None:
    assert axis_in_sample(shape, True, lengths) == axis


def _rows(*counts: int) -> list[dict[str, Any]]:
    """Requests a, b, c, ... with so many rows each."""
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [
        {"request_id": "abcdefgh"[i], "first_row": begin, "rows": count, "first_position": 10 * i}
        for i, (begin, count) in enumerate(zip(begins, counts, strict=True))
    ]


def _told(*counts: int, kept: str = "", padded: int = 0, **more: Any) -> StepRows:
    rows = StepRows((lambda request: request in kept) if kept else None, **more)
    rows.batch("abcdefgh"[: len(counts)])
    rows.enter([RowSet("tokens", _rows(*counts), padded, batched=True)], main=True)
    rows.calls_begun = lambda: [("layer", "layer", 0)]
    return rows


def _record(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": "step_0/layer/outputs_cpu", "shape": list(shape), "dtype": dtype}


@pytest.mark.parametrize(("counts", "padded"), [((2, 1, 3), 0), ((2, 1, 3), 2), ((1,), 0), ((1,), 7)])
def test_of_what_is_stored_whole_the_reader_tells_the_same(counts: tuple[int, ...], padded: int) -> None:
    document = _told(*counts, padded=padded).document()
    assert document["batched"] is True
    total = sum(counts) + padded
    states = torch.arange(total * 2.0).view(1, total, 2)
    heads = states.view(1, total, 1, 2).transpose(1, 2).expand(1, 9, total, 2)
    for tensor in (states, heads, states[0]):
        spans = CallRows(document).spans(_record(*tensor.shape))
        found = [
            (span.row["request_id"], as_rows(tensor, span.axis)[span.begin : span.begin + span.length])
            for span in spans
        ]
        assert [request for request, _ in found] == list("abc"[: len(counts)])
        real = torch.cat([part.reshape(len(part), -1)[:, :2] for _, part in found])
        assert torch.equal(real, states[0, : sum(counts)])
    assert not CallRows(document).spans(_record(1, 3 if total != 3 else 4, 64))


def test_rows_that_are_cut_come_first_in_what_is_stored() -> None:
    rows = _told(2, 1, 3, kept="ac", padded=2)
    states = torch.arange(16.0).view(1, 8, 2)
    ids = torch.arange(8).view(1, 8)
    for tensor in (states, ids):
        kept = rows.cut(tensor)
        assert kept is not None and torch.equal(kept, tensor[0, [0, 1, 3, 4, 5]])
    heads = torch.arange(64.0).view(1, 4, 8, 2)
    kept = rows.cut(heads)
    assert kept is not None and torch.equal(kept, heads[0].transpose(0, 1)[[0, 1, 3, 4, 5]])
    # Nobody knows whose these are, and of the requests one is left out.
    assert rows.cut(torch.ones(1, 8, 8, 2)) is None and rows.cut(torch.ones(1, 8)) is None
    document = rows.document()
    assert "batched" not in document
    spans = CallRows(document).spans(_record(5, 2))
    assert [(span.row["request_id"], span.begin, span.length, span.axis) for span in spans] == [
        ("a", 0, 2, 0),
        ("c", 2, 3, 0),
    ]


def test_the_last_row_of_each_request_is_cut_out() -> None:
    rows = _told(2, 1, 3, last=True)
    states = torch.arange(12.0).view(1, 6, 2)
    kept = rows.cut(states)
    assert kept is not None and torch.equal(kept, states[0, [1, 2, 5]])
    # What is stored whole beside it may look like a single row of one request.
    alone = _told(1, padded=7, last=True)
    kept = alone.cut(torch.ones(1, 8, 4))
    assert kept is not None and kept.shape == (1, 4)
    odd = torch.ones(1, 3, 4)
    assert alone.cut(odd) is odd
    read = CallRows(alone.document())
    assert read.spans(_record(1, 4)) and not read.spans(_record(1, 3, 4))


def test_row_sets_of_single_calls_tell_it_too() -> None:
    rows = _told(2, 1)
    calls = iter([["layer"], ["draft"], []])
    rows.calls_begun = lambda: [(each, each, 0) for each in next(calls)]
    rows.enter([RowSet("drafts", _rows(1, 1), batched=True)])
    rows.enter([])
    document = rows.document()
    entry = next(each for each in document["call_rows"] if each["calls"] == ["draft"])
    assert entry["sets"][0]["batched"] is True
    spans = CallRows(document).spans({**_record(1, 2, 8), "name": "step_0/draft/outputs_cpu"})
    assert [(span.row["request_id"], span.axis) for span in spans] == [("a", 1), ("b", 1)]


def test_what_is_said_of_it_fits_the_schema() -> None:
    rows = _told(2, 1, padded=5)
    rows.enter([RowSet("drafts", _rows(1, 1), batched=True)])
    document = rows.document()
    validator = Draft202012Validator({**tlcore_schemas.load("step.v1"), "required": []})
    (entry,) = (each for each in document["call_rows"] if each["sets"])
    for place in (document, entry["sets"][0]):
        validator.validate(document)
        assert place["batched"] is True
        place["batched"] = "yes"
        assert not validator.is_valid(document)
        place["batched"] = True


def test_shapes_of_something_else_are_nobodys() -> None:
    odd = RowSet("tokens", _rows(2, 3), single=((1, 5, ANY),), batched=True)
    found = placed((1, 5, 8), False, [odd])
    assert found.rows is None and found.fits
    assert placed((1, 5, 8, 2), False, [odd]).rows is odd


def test_other_sets_of_a_call_may_contradict() -> None:
    tokens = RowSet("tokens", _rows(1), padded=7, batched=True)
    item = RowSet("items", [{"request_id": "x", "first_row": 0, "rows": 1}])
    assert placed((1, 8, 64), False, [tokens, item])[:1] == (None,)
    assert placed((8, 64), False, [tokens, item]).rows is tokens


def test_old_runs_are_read_as_ever() -> None:
    rows = CallRows({"rows": _rows(1)})
    assert [span.axis for span in rows.spans(_record(1, 8, 64))] == [0]
