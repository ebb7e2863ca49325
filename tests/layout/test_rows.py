"""Whose row is whose: one rule, which gives nobody what it does not know."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tlcore.layout.drafts import Decided, accept
from tlcore.layout.rows import ANY, CallRows, RowSet, is_whole_numbers, row_set_of


def _rows(*counts: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Requests a, b, c, ... with so many rows each."""
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [
        {"request_id": "abcdefgh"[i], "first_row": begin, "rows": count, "first_position": first, **more}
        for i, (begin, count) in enumerate(zip(begins, counts, strict=True))
    ]


def _record(name: str, *shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": f"step_0/{name}/outputs_cpu", "shape": list(shape), "dtype": dtype}


TOKENS = RowSet("tokens", _rows(2, 1, 3), padded=2)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (8, 4)])
def test_rows_of_a_length_that_the_call_has(shape: tuple[int, ...]) -> None:
    assert row_set_of(shape, False, [TOKENS]) is TOKENS


@pytest.mark.parametrize(
    ("shape", "whole"),
    [((), False), ((3, 4), False), ((7, 4), False), ((1, 6), False), ((4, 6), False), ((6, 6), True)],
    ids=["scalar", "one for each request", "between", "axes in another order", "transposed", "positions"],
)
def test_nothing_is_guessed_from_another_length(shape: tuple[int, ...], whole: bool) -> None:
    assert row_set_of(shape, whole, [TOKENS]) is None


def test_the_length_chooses_among_the_sets_of_one_call_only() -> None:
    items, tokens = RowSet("items", _rows(1, 1)), RowSet("item_tokens", _rows(4, 9))
    assert row_set_of((2, 3, 8, 8), False, [items, tokens]) is items
    assert row_set_of((13, 5), False, [items, tokens]) is tokens
    assert row_set_of((6, 5), False, [items, tokens]) is None


def test_two_sets_of_one_length_that_differ_are_not_certain() -> None:
    one, other = RowSet("item_tokens", _rows(4, 9)), RowSet("item_parts", _rows(9, 4))
    assert row_set_of((13, 5), False, [one, other]) is None
    assert row_set_of((13, 5), False, [one, RowSet("again", _rows(4, 9))]) is one


def test_sets_that_differ_in_positions_alone_tell_the_owner() -> None:
    """Of images that are one part each, the parts' rows are those of the images."""
    items, parts = RowSet("items", _rows(1, 1, first=7)), RowSet("item_parts", _rows(1, 1))
    parts = parts.without_positions
    for sets in ([items, parts], [parts, items]):
        found = row_set_of((2, 16, 64), False, sets)
        assert found is not None and found is row_set_of((2, 3), False, sets)
        assert [(span.row["request_id"], span.begin, span.length, span.first) for span in found.spans] == [
            ("a", 0, 1, None),
            ("b", 1, 1, None),
        ]


def test_owners_are_the_same_in_other_pieces() -> None:
    owners = zip(_rows(2, 2, 1), "aab", strict=True)
    tokens = RowSet("item_tokens", [{**row, "request_id": owner} for row, owner in owners])
    found = row_set_of((5, 8), False, [tokens, RowSet("item_parts", _rows(4, 1)).without_positions])
    assert found is not None and found.owners == (("a", None, 4), ("b", None, 1))
    assert all(span.first is None for span in found.spans)
    assert row_set_of((5, 8), False, [tokens, RowSet("item_parts", _rows(3, 2))]) is None


def test_sets_with_drafts_must_agree_in_all() -> None:
    one, other = RowSet("tokens", _rows(2, 1, drafts=1)), RowSet("sampled", _rows(2, 1, first=3))
    assert row_set_of((3, 8), False, [one, other]) is None


def test_listed_calls_have_their_own_rows_and_all_others_those_of_the_step() -> None:
    document = {
        "rows": _rows(2, 1, 3),
        "call_rows": [
            {"calls": ["logits"], "sets": [{"kind": "sampled", "rows": _rows(1, 1, 1, first=5)}]},
            {"calls": ["logits_1"], "sets": [{"kind": "prompt", "rows": _rows(2)}]},
            {"calls": ["encoder"], "sets": []},
        ],
    }
    rows = CallRows(document)
    assert [
        (s.row["request_id"], s.begin, s.length, s.first) for s in rows.spans(_record("layer", 6, 4))
    ] == [
        ("a", 0, 2, 0),
        ("b", 2, 1, 0),
        ("c", 3, 3, 0),
    ]
    assert [(s.begin, s.first) for s in rows.spans(_record("logits", 3, 9))] == [(0, 5), (1, 5), (2, 5)]
    assert [(s.row["request_id"], s.length) for s in rows.spans(_record("logits_1", 2, 9))] == [("a", 2)]
    # A length that another call's tensors have tells nothing.
    assert rows.spans(_record("logits_1", 3, 9)) == ()
    assert rows.spans(_record("encoder", 6, 4)) == ()
    assert rows.spans(_record("layer", 3, 4)) == ()


def test_rows_of_rejected_tokens_are_nobodys() -> None:
    rows = _rows(4, 2)
    rows[0]["accepted"], rows[1]["accepted"] = 2, 2
    spans = [span.kept() for span in CallRows({"rows": rows}).spans(_record("layer", 6, 4))]
    assert [(span.begin, span.length) for span in spans] == [(0, 2), (4, 2)]


def test_drafts_that_nobody_decided_on_are_nobodys_and_another_rank_may_know() -> None:
    rows = _rows(4)
    rows[0]["drafts"] = 3
    (span,) = CallRows({"rows": rows}).spans(_record("layer", 4, 4))
    assert span.kept().length == 1
    (span,) = CallRows({"rows": rows}, {"a": {"accepted": 3}}).spans(_record("layer", 4, 4))
    assert span.kept().length == 3


@pytest.mark.parametrize(("decided", "last"), [(Decided(2, 3), 2), (Decided(0, 1), 0), (Decided(3, 3), 2)])
def test_the_last_row_is_what_the_last_token_was_sampled_from(decided: Decided, last: int) -> None:
    rows = _rows(4, first=7, drafts=3, undecided=True)
    accept(rows, {}, {"a": decided})
    (span,) = CallRows({"rows": rows}).spans(_record("layer", 4, 4))
    assert (span.kept().begin, span.kept().length, span.kept().first) == (last, 1, 7 + last)
    assert rows[0]["accepted"] == 1 + decided.kept and "undecided" not in rows[0]


@pytest.mark.parametrize(("ahead", "accepted"), [(0, 3), (1, 2), (9, 0)])
def test_a_draft_model_may_have_gone_on_beyond_the_requests_end(ahead: int, accepted: int) -> None:
    drafted = _rows(4, first=7, accepted=4, ahead=ahead)
    accept([], {"call_rows": [{"sets": [{"rows": drafted}]}]}, {"a": Decided(2, 2, 10)})
    assert drafted == _rows(4, first=7, accepted=accepted)


@pytest.mark.parametrize(
    "damage",
    [
        {"first_row": 1},
        {"first_row": -1},
        {"rows": "2"},
        {"rows": True},
        {"first_position": -3},
        {"accepted": "all"},
        {"drafts": -1},
        {"request_id": None},
    ],
)
def test_damaged_rows_are_refused(damage: dict[str, Any]) -> None:
    (row,) = _rows(2)
    with pytest.raises(ValueError, match="request_id"):
        CallRows({"rows": [{**row, **damage}]})
    with pytest.raises(ValueError, match="request_id"):
        CallRows({"call_rows": [{"calls": ["x"], "sets": [{"kind": "tokens", "rows": [{**row, **damage}]}]}]})


@pytest.mark.parametrize(
    "call_rows",
    [[{"calls": ["x"]}], [{"sets": []}], ["x"], "x", [{"calls": ["x"], "sets": [{"rows": []}]}], {"x": 1}],
)
def test_damaged_call_rows_are_refused(call_rows: Any) -> None:
    with pytest.raises(ValueError, match=r"call_rows|request_id"):
        CallRows({"call_rows": call_rows})


@pytest.mark.parametrize(
    ("before", "found"),
    [({}, {1}), ({"before_rows": []}, {1, 2, 3, 6}), ({"before_rows": [3]}, {1, 2, 6})],
    ids=["nobody knows", "rows come first", "positions of three dimensions"],
)
def test_whole_numbers_with_two_axes_of_one_length(before: dict[str, Any], found: set[int]) -> None:
    """Six experts of each of six tokens, or three dimensions of the positions of three tokens."""
    for tokens in (1, 2, 3, 6):
        rows = CallRows({"rows": _rows(tokens), **before})
        spans = rows.spans(_record("topk", tokens, tokens, dtype="int64"))
        assert bool(spans) == (tokens in found)
        # No tensor has its rows behind an axis of another length.
        assert rows.spans(_record("positions", 5, tokens, dtype="int64")) == ()


def test_shapes_of_one_item_among_several_are_kept_with_the_rows() -> None:
    rows = _rows(1, 1, 1)
    entry = {"kind": "items", "rows": rows, "single": [[3, 28, 28], [3, 5, ANY]]}
    stored = CallRows({"call_rows": [{"calls": ["encoder"], "sets": [entry]}]})
    for shape, known in (((3, 28, 28), False), ((3, 5, 8), False), ((3, 5), True), ((3, 5, 8, 1), True)):
        found = stored.placed(_record("encoder", *shape))
        assert bool(found.rows) == known and found.fits
    with pytest.raises(ValueError, match="call_rows"):
        CallRows({"call_rows": [{"calls": ["encoder"], "sets": [{**entry, "single": 3}]}]})


def test_the_scores_of_one_request_are_not_shared_among_as_many() -> None:
    """Two labels of two requests at once; but which token is each one's last is one number for each."""
    tokens, requests = (
        RowSet(kind, _rows(*n), vectors=True) for kind, n in (("tokens", (2, 3)), ("requests", (1, 1)))
    )
    entry = {"kind": "requests", "rows": list(requests.rows), "vectors": True}
    stored = CallRows({"call_rows": [{"calls": ["pooler"], "sets": [entry]}]})
    for length in (2, 5):
        assert row_set_of((length,), False, [tokens, requests]) is None
        assert row_set_of((length,), True, [tokens, requests]) in (tokens, requests)
        assert row_set_of((length, 4), False, [tokens, requests]) in (tokens, requests)
    assert not stored.spans(_record("pooler", 2)) and stored.placed(_record("pooler", 2)).fits
    assert [span.row["request_id"] for span in stored.spans(_record("pooler", 2, 4))] == ["a", "b"]


@pytest.mark.parametrize("before", [3, [-1], ["3"], [True], {}])
def test_damaged_lengths_of_axes_are_refused(before: Any) -> None:
    with pytest.raises(ValueError, match="before_rows"):
        CallRows({"before_rows": before})


def test_whole_numbers() -> None:
    assert is_whole_numbers("torch.int64") and is_whole_numbers("uint8") and is_whole_numbers("bool")
    assert not is_whole_numbers("float32") and not is_whole_numbers("torch.bfloat16")


def test_every_row_of_a_random_batch_is_found_once() -> None:
    chance = random.Random(5)
    for _ in range(200):
        counts = [chance.randint(1, 9) for _ in range(chance.randint(1, 8))]
        rows, padded = _rows(*counts), chance.randint(0, 3)
        total = sum(counts)
        owners: dict[int, tuple[str, int]] = {}
        for span in CallRows({"rows": rows, "padded_rows": padded}).spans(_record("m", total + padded, 2)):
            for i in range(span.length):
                assert owners.setdefault(span.begin + i, (span.row["request_id"], i)) == (
                    span.row["request_id"],
                    i,
                )
        expected = [("abcdefgh"[k], i) for k, count in enumerate(counts) for i in range(count)]
        assert [owners.get(row) for row in range(total)] == expected and len(owners) == total
