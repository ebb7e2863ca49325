"""Rows of requests that were not chosen are left out before anything is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.config.configuration import load_config
from tlcore.engine.filters.rows import StepRows
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.layout.drafts import Decided, accept
from tlcore.layout.rows import ANY, CallRows, RowSet
from tlcore.layout.windows import Window


def _rows(*counts: int) -> list[dict[str, Any]]:
    """Requests a, b, c, ... with so many rows each."""
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [
        {"request_id": "abcdefgh"[i], "first_row": begin, "rows": count, "first_position": 10 * i}
        for i, (begin, count) in enumerate(zip(begins, counts, strict=True))
    ]


def _told(*counts: int, kept: str = "ac", last: bool = False, padded: int = 0) -> StepRows:
    """Three requests of so many tokens, of which some are kept."""
    rows = StepRows(lambda request: request in kept, last)
    rows.batch("abc")
    rows.enter([RowSet("tokens", _rows(*counts), padded)], main=True)
    return rows


@pytest.mark.parametrize("length", [6, 8])
def test_token_rows_are_kept_and_padding_left_out(length: int) -> None:
    tensor = torch.arange(length * 2.0).view(length, 2)
    kept = _told(2, 1, 3, padded=2).cut(tensor)
    assert kept is not None and torch.equal(kept, tensor[[0, 1, 3, 4, 5]])


def test_neighbouring_rows_are_not_copied() -> None:
    tensor = torch.arange(12.0).view(6, 2)
    kept = _told(1, 2, 3, kept="bc").cut(tensor)
    assert kept is not None and kept.tolist() == tensor[1:].tolist()
    assert kept.data_ptr() == tensor[1].data_ptr()


UNKNOWN = [
    torch.ones(7, 2),
    torch.ones(3, 6),
    torch.tensor(1.0),
    torch.zeros(6, 6, dtype=torch.int64),
    torch.ones(6, 2).to_sparse(),
    nn.Parameter(torch.ones(6, 2)),
]
NAMES = ["other length", "a row for each request", "scalar", "positions", "sparse", "parameter"]


@pytest.mark.parametrize("tensor", UNKNOWN, ids=NAMES)
def test_what_is_not_known_is_stored_only_where_nobody_is_left_out(tensor: torch.Tensor) -> None:
    assert _told(2, 1, 3).cut(tensor) is None
    assert _told(2, 1, 3, kept="abc").cut(tensor) is tensor
    all_last = StepRows(None, last=True)
    all_last.batch("abc")
    assert all_last.cut(tensor) is tensor


def test_rows_are_those_of_the_call_that_runs() -> None:
    rows = _told(2, 1, 3, kept="bc")
    calls = iter([["layer"], ["logits"], ["logits_1"], [], ["layer_1"], []])
    rows.calls_begun = lambda: [(each, "", 0) for each in next(calls)]
    tensor = torch.arange(3.0)
    rows.enter([RowSet("sampled", _rows(1, 1, 1))])
    kept = rows.cut(tensor)
    assert kept is not None and kept.tolist() == [1, 2]
    rows.enter([RowSet("prompt", _rows(3))])
    kept = rows.cut(tensor)
    assert kept is not None and kept.tolist() == []
    rows.enter([])
    assert rows.cut(tensor) is None
    rows.resume_main()
    kept = rows.cut(torch.arange(6.0))
    assert kept is not None and kept.tolist() == [2, 3, 4, 5]
    document = rows.document()
    assert [(row["request_id"], row["first_row"], row["rows"]) for row in document["rows"]] == [
        ("b", 0, 1),
        ("c", 1, 3),
    ]
    assert [
        (entry["calls"], [len(each["rows"]) for each in entry["sets"]]) for entry in document["call_rows"]
    ] == [
        (["logits"], [2]),
        (["logits_1"], [0]),
    ]


def test_what_was_cut_was_certain_whatever_its_shape_is_then() -> None:
    """Of three images one is kept, which then looks like a single one."""
    rows = StepRows(lambda request: request == "b")
    rows.calls_begun = lambda: [("encoder", "encoder", 0)]
    rows.batch("abc")
    rows.before = (1,)
    rows.enter([RowSet("items", _rows(1, 1, 1), vectors=True, single=((1, ANY), (3, 28)))])
    tensor = torch.arange(6.0).view(3, 2)
    kept = rows.cut(tensor)
    assert kept is not None and torch.equal(kept, tensor[1:2])
    assert rows.cut(torch.ones(3)) is None and rows.cut(torch.ones(3, 28)) is None
    read = CallRows(rows.document())
    record = {"name": "step_0/encoder/outputs_cpu", "shape": [1, 2], "dtype": "float32"}
    assert [span.row["request_id"] for span in read.spans(record)] == ["b"]
    assert read.spans({**record, "shape": [1, 1], "dtype": "int64"})


def test_within_an_encoder_rows_have_owners_and_no_positions() -> None:
    """It may sort the tokens of an item; what it gives at last lies as the prompt does."""
    rows = StepRows(lambda request: request in "ac")
    rows.inner = lambda module: module != "encoder"
    rows.calls_begun = lambda: [("encoder", "encoder", 0), ("encoder.merger", "encoder.merger", 0)]
    rows.batch("abc")
    items = RowSet("items", _rows(1, 1, 1), single=((3, 7),))
    rows.enter([items, RowSet("item_tokens", _rows(2, 1, 3), single=((6, 5),))])
    tensor = torch.arange(12.0).view(6, 2)
    for module in ("encoder", "encoder.merger"):
        assert rows.hears(module)
        kept = rows.cut(tensor)
        assert kept is not None and torch.equal(kept, tensor[[0, 1, 3, 4, 5]])
        assert rows.cut(torch.ones(6, 5)) is None and rows.cut(torch.ones(3, 7)) is None
    read = CallRows(rows.document())
    for module, positions in (("encoder", [0, 20]), ("encoder.merger", [None, None])):
        spans = read.spans({"name": f"step_0/{module}/outputs_cpu", "shape": [5, 2], "dtype": "float32"})
        found = [(span.row["request_id"], span.length, span.first) for span in spans]
        assert found == [("a", 2, positions[0]), ("c", 3, positions[1])]
        # Which item is whose is told in any case.
        spans = read.spans({"name": f"step_0/{module}/outputs_1_cpu", "shape": [2, 2], "dtype": "float32"})
        assert [span.first for span in spans] == [0, 20]


def test_what_was_stored_whole_is_no_requests_whatever_its_shape() -> None:
    """Of three requests the last rows are kept; positions of three dimensions are (3, tokens)."""
    rows = StepRows(None, last=True)
    rows.batch("abc")
    rows.before = (3,)
    rows.enter([RowSet("tokens", _rows(2, 1, 3))], main=True)
    rows.calls_begun = lambda: [("layer", "layer", 0)]
    positions = torch.zeros(3, 6, dtype=torch.int64)
    assert rows.cut(positions) is positions
    read = CallRows(rows.document())
    record = {"name": "step_0/layer/inputs_positions_cpu", "shape": [3, 6], "dtype": "int64"}
    assert not read.spans(record) and read.spans({**record, "shape": [3, 2], "dtype": "float32"})


@pytest.mark.parametrize("last", [False, True])
def test_states_in_as_many_planes_as_tokens_are_no_requests(last: bool) -> None:
    rows = StepRows(None, last=last)
    rows.batch("abc")
    rows.enter([RowSet("tokens", _rows(1, 1, 1), single=((3, 3, ANY),))], main=True)
    rows.calls_begun = lambda: [("layer", "layer", 0)]
    states = torch.ones(3, 3, 8)
    assert rows.cut(states) is states
    read = CallRows(rows.document())
    record = {"name": "step_0/layer/outputs_cpu", "shape": [3, 3, 8], "dtype": "float32"}
    assert not read.spans(record) and len(read.spans({**record, "shape": [3, 8]})) == 3


def test_of_drafts_all_that_may_be_the_last_are_kept() -> None:
    entries = _rows(5, 2)
    entries[0]["drafts"], entries[1]["drafts"] = 3, 0
    rows = StepRows(None, last=True)
    rows.batch("ab")
    rows.enter([RowSet("tokens", entries)], main=True)
    kept = rows.cut(torch.arange(7.0))
    assert kept is not None and kept.tolist() == [1, 2, 3, 4, 6]
    document = rows.document()
    accept(document["rows"], document, {"a": Decided(2, 3)})
    keys = ("first_row", "rows", "first_position", "accepted")
    assert [tuple(row[key] for key in keys) for row in document["rows"]] == [(0, 4, 1, 3), (4, 1, 11, 1)]


def test_the_last_row_is_an_accepted_one_where_that_is_known() -> None:
    entries = _rows(5, 2)
    entries[0]["accepted"], entries[1]["accepted"] = 3, 0
    rows = StepRows(None, last=True)
    rows.batch("ab")
    rows.enter([RowSet("tokens", entries)], main=True)
    kept = rows.cut(torch.arange(7.0))
    assert kept is not None and kept.tolist() == [2, 6]
    assert [(row["first_row"], row["accepted"]) for row in rows.document()["rows"]] == [(0, 1), (1, 0)]


def test_in_the_midst_of_a_prompt_no_row_is_the_last_one() -> None:
    """As with chunked prefill: no token is sampled until the prompt is there."""
    rows = StepRows(None, last=True)
    rows.batch("ab", unsampled="a")
    rows.enter([RowSet("tokens", _rows(5, 2))], main=True)
    kept = rows.cut(torch.arange(7.0))
    assert kept is not None and kept.tolist() == [6]
    assert [(row["request_id"], row["rows"]) for row in rows.document()["rows"]] == [("b", 1)]
    rows.begin_step()
    rows.batch("ab")
    rows.enter([RowSet("tokens", _rows(5, 2))], main=True)
    kept = rows.cut(torch.arange(7.0))
    assert kept is not None and kept.tolist() == [4, 6]


def _session(sink: MemorySink) -> tuple[Session, nn.Module]:
    config = load_config(
        {"log_step_ids": [], "output_dir": "memory://unused", "request_ids": "a", "module_call_match": "."}
    )
    session = Session(config, new_run(config), sink, inline=True)
    model = nn.Sequential(nn.Linear(2, 2))
    session.attach(model)
    return session, model


def test_only_kept_rows_are_captured() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    for entries, tokens, row in ((_rows(1, 5)[::-1], 6, 5), (_rows(1, 3), 4, 0)):
        for first, entry in zip((0, entries[0]["rows"]), entries, strict=True):
            entry["first_row"] = first
        session.begin_step()
        session.rows.batch("ab")
        session.rows.enter([RowSet("tokens", entries)], main=True)
        x = torch.randn(tokens, 2)
        with torch.inference_mode():
            y = model(x)
        session.end_step()
        step = f"step_{len(sink.steps) - 1}"
        assert torch.equal(sink.tensors[f"{step}/0/inputs_0_cpu"], x[row : row + 1])
        assert torch.equal(sink.tensors[f"{step}/0/outputs_cpu"], y[row : row + 1])
        assert [entry["request_id"] for entry in sink.steps[-1].rows or ()] == ["a"]
    session.close()
    assert session.ledger.bytes_captured == session.ledger.bytes_stored == 2 * 2 * 2 * 4


def test_without_rows_nothing_is_stored_and_everything_accounted_for() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    session.begin_step()
    model(torch.ones(6, 2))
    session.end_step()
    session.close()
    assert sink.tensors == {} and session.ledger.balanced
    assert session.ledger.reasons == {"skipped: rows of the requests unknown": 2}


def test_a_step_that_is_not_wanted_is_only_counted() -> None:
    sink = MemorySink()
    session, model = _session(sink)
    assert not session.begin_step(wanted=False)
    model(torch.ones(6, 2))
    session.end_step()
    assert session.begin_step()
    session.end_step()
    session.close()
    assert [step.step for step in sink.steps] == [1]


@pytest.mark.parametrize("key", [{"rows": "last"}, {"request_ids": ["a"]}, {"sample_rate": 0.5}])
def test_where_nobody_says_whose_the_rows_are_nothing_is_stored(
    key: dict[str, object], tmp_path: Path
) -> None:
    with tlcore.capture(nn.Linear(2, 2), key, output_dir=str(tmp_path)) as capture:
        capture._model(torch.ones(3, 2))
    assert (capture.ledger.captured, capture.ledger.stored) == (2, 0)
    assert capture.ledger.reasons == {"skipped: rows of the requests unknown": 2}
    assert "nothing said which rows are whose; give the model an attention_mask" in capture.remarks[0]


def test_patterns_of_requests_are_checked() -> None:
    with pytest.raises(tlcore.ConfigError, match=r"\$\.request_ids\[1\]: '\(' is not a regular expression"):
        load_config({"request_ids": ["a", "("]})
    assert load_config({"request_ids": "a"}).request_ids == ("a",)


def test_a_draft_models_calls_of_shared_modules_go_by_names_of_their_own() -> None:
    sink = MemorySink()
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused"})
    session = Session(config, new_run(config), sink, inline=True)
    shared = nn.Identity()
    target, draft = nn.Sequential(shared, nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), shared)
    session.attach(target)
    session.attach_draft(draft)
    for _ in range(2):
        session.begin_step()
        target(torch.ones(1, 2))
        session.turn(draft=True)
        draft(torch.zeros(1, 2))
        draft(torch.zeros(1, 2))
        session.turn(draft=False)
        shared(torch.ones(1, 2))
        session.end_step()
        target(torch.ones(1, 2))
    session.close()
    drafted = ["draft", "draft.0", "draft.1", "draft_1", "draft.0_1", "draft.1_1"]
    calls = ["_root", "0", "1", *drafted, "0_1"]
    assert [step.calls for step in sink.steps] == [calls, calls]
    assert "forward" not in vars(shared)


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize(("begin", "end"), [(0, 5), (3, 5), (4, 9), (0, 3), (1, 4), (2, 4)])
def test_a_window_among_drafts_keeps_what_stayed_in_the_request(begin: int, end: int, kept: int) -> None:
    """Five rows from position 0 on, of which the last three are of drafts; so many of them stayed."""
    entry = {**_rows(5)[0], "drafts": 3}
    rows = StepRows(None, window=Window(begin, end))
    rows.batch("a")
    rows.enter([RowSet("tokens", [entry])], main=True)
    cut = rows.cut(torch.arange(5))
    document = rows.document()
    accept(document["rows"], document, {"a": Decided(kept, kept + 1)})
    (row,) = document["rows"]
    first, count = row["first_position"], row["accepted"]
    assert cut is not None and cut.tolist() == list(range(first, first + row["rows"]))
    assert list(range(first, first + count)) == [p for p in range(2 + kept) if begin <= p < end]
    assert row.keys().isdisjoint({"drafts", "drafts_before"})
