"""Rows of drafts wait until it is known which of them stay, and the others are cut before they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.sinks import MemorySink
from tlcore.config.configuration import load_config
from tlcore.engine.batch import Batch, StepEnd
from tlcore.engine.filters.run_bytes import RunBytes
from tlcore.engine.new_run import new_run
from tlcore.engine.pipeline.executors import InlineExecutor
from tlcore.engine.session import Session
from tlcore.layout.drafts import Decided
from tlcore.layout.rows import CallRows, RowSet

# Of a the rows of positions 0 to 4, the last three of drafts, and of b a chunk of its prompt.
_ENTRIES: list[dict[str, Any]] = [
    {"request_id": "a", "first_row": 0, "rows": 5, "first_position": 0, "drafts": 3},
    {"request_id": "b", "first_row": 5, "rows": 2, "first_position": 10},
]
_PROMPTS = {("a", ""): 1, ("b", ""): 12}
VALUES = torch.arange(14.0).view(7, 2)


def _step(sink: MemorySink, kept: int | None, calls: int = 1, inline: bool = True, **keys: Any) -> Session:
    """Capture one step, of whose drafts so many stay; None where nobody says."""
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", **keys})
    session = Session(config, new_run(config), sink, inline=inline)
    model = nn.Sequential(*(nn.Identity() for _ in range(calls)))
    session.attach(model)
    session.begin_step()
    session.rows.batch("ab", _PROMPTS)
    session.rows.enter([RowSet("tokens", _ENTRIES)], main=True)
    with torch.inference_mode():
        model(VALUES.clone())
    decided = {} if kept is None else {"a": Decided(kept, kept + 1, 3 + kept)}
    session.end_step(decided=lambda: decided)
    session.close()
    assert session.ledger.balanced and session.ledger.failed == session.ledger.dropped == 0
    return session


def _said(sink: MemorySink) -> list[tuple[Any, ...]]:
    """Of each entry the rows that its request has: whose, from which row and position on, and how many."""
    (step,) = sink.steps
    name = next(name for name in sink.tensors if name.endswith("0/outputs_cpu"))
    record = {"name": name, "shape": list(sink.tensors[name].shape), "dtype": "float32"}
    spans = CallRows(step.to_json(())).spans(record)
    assert spans == tuple(span.kept() for span in spans)
    return [(span.row["request_id"], span.begin, span.length, span.first) for span in spans]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("kept", range(4))
def test_only_the_row_that_the_last_token_was_sampled_from_is_stored(kept: int, inline: bool) -> None:
    sink = MemorySink()
    session = _step(sink, kept, inline=inline, rows="last")
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], VALUES[[1 + kept, 6]])
    assert _said(sink) == [("a", 0, 1, 1 + kept), ("b", 1, 1, 11)]
    # Captured is what is stored: four times two rows of two numbers.
    assert session.ledger.bytes_captured == 4 * 2 * 2 * 4


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [("response", range(1, 99)), ("prompt", range(1)), ({"from": 0}, range(99)), ({"from": 3}, range(3, 99))],
)
def test_of_a_window_only_rows_of_tokens_that_stay_are_stored(rows: Any, wanted: range, kept: int) -> None:
    sink = MemorySink()
    _step(sink, kept, rows=rows)
    own = [position for position in range(2 + kept) if position in wanted]
    others = [
        position for position in (10, 11) if rows == "prompt" or (rows != "response" and position in wanted)
    ]
    places = [*own, *(position - 5 for position in others)]
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], VALUES[places])
    expected = [("a", 0, len(own), own[0])] if own else []
    expected += [("b", len(own), len(others), others[0])] if others else []
    assert _said(sink) == expected


def test_all_rows_are_stored_where_all_are_asked_for() -> None:
    every: list[dict[str, Any]] = [{}, {"request_ids": "a|b"}]
    for keys in every:
        sink = MemorySink()
        _step(sink, 1, **keys)
        assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], VALUES)
        assert sink.steps[0].rows is not None and sink.steps[0].rows[0]["accepted"] == 3


def test_where_nobody_says_which_drafts_stay_their_rows_do() -> None:
    sink = MemorySink()
    _step(sink, None, rows="last")
    assert torch.equal(sink.tensors["step_0/0/outputs_cpu"], VALUES[[1, 2, 3, 4, 6]])
    (row, _) = sink.steps[0].rows or ()
    assert (row["rows"], row["drafts"]) == (4, 3)


def test_a_step_that_does_not_fit_into_the_queue_is_stored_with_them() -> None:
    """Its memory is needed before the sampler has run."""
    sink = MemorySink()
    _step(sink, 1, calls=4, inline=False, rows="last", queue_bytes=96)
    assert len(sink.tensors) == 10
    for tensor in sink.tensors.values():
        assert torch.equal(tensor, VALUES[[1, 2, 3, 4, 6]])
    (row, _) = sink.steps[0].rows or ()
    assert (row["first_position"], row["rows"], row["accepted"], row["last"]) == (1, 4, 2, 1)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("most", [16, 31, 32, 63, 64, 200])
def test_of_a_run_with_a_limit_the_rows_that_stay_are_counted(most: int, inline: bool) -> None:
    """Each of four tensors has five rows when it is copied, and two, or 16 bytes, when it is stored."""
    sink = MemorySink()
    session = _step(sink, 1, inline=inline, rows="last", max_run_bytes=most)
    stored = min(4, most // 16)
    assert session.ledger.stored == stored
    assert session.ledger.reasons["skipped: max_run_bytes reached"] == 4 - stored
    assert all(torch.equal(tensor, VALUES[[2, 6]]) for tensor in sink.tensors.values())


def test_what_could_not_be_copied_is_not_counted() -> None:
    room = RunBytes(100)
    assert room.take(60) and not room.full
    room.give_back(60)
    assert room.take(70) and not room.take(31)
    # Once a tensor was refused, all are.
    room.give_back(70)
    assert room.full and not room.take(1)


@pytest.mark.parametrize("keys", [{"store_dtype": "bfloat16"}, {"capture": "both"}])
def test_what_is_said_of_values_is_said_of_those_that_stay(keys: dict[str, Any]) -> None:
    sink = MemorySink()
    _step(sink, 1, rows="last", **keys)
    stored = sink.tensors["step_0/0/outputs_cpu"]
    assert torch.equal(stored.float(), VALUES[[2, 6]])
    if "capture" in keys:
        (told,) = (
            each["stats"] for name, each in sink.steps[0].structures.items() if name == "0/outputs.json"
        )
        assert (told["min"], told["max"], told["numel"]) == (4.0, 13.0, 4)


def _capture(session: Session, model: nn.Module, *steps: torch.Tensor) -> None:
    session.attach(model)
    for values in steps:
        session.begin_step()
        session.rows.batch("ab", _PROMPTS)
        session.rows.enter([RowSet("tokens", _ENTRIES)], main=True)
        model(values)
        session.end_step(decided=lambda: {"a": Decided(0, 1, 3)})


def test_a_step_whose_end_never_comes_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink()
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", "rows": "last"})
    session = Session(config, new_run(config), sink, inline=True)
    plain = InlineExecutor.submit

    def losing(executor: InlineExecutor, item: Batch | StepEnd) -> None:
        if not (isinstance(item, StepEnd) and item.step == 0):
            plain(executor, item)

    monkeypatch.setattr(InlineExecutor, "submit", losing)
    _capture(session, nn.Sequential(nn.Identity()), VALUES, VALUES)
    assert session._pool.in_flight == 0
    session.close()
    assert session.ledger.balanced and session.ledger.failed and [each.step for each in sink.steps] == [1]


def test_rows_with_a_scale_are_cut_like_others() -> None:
    values, sink = torch.randn(7, 64), MemorySink()
    config = load_config(
        {"log_step_ids": [], "output_dir": "memory://unused", "rows": "last", "store_dtype": "int8"}
    )
    session = Session(config, new_run(config), sink, inline=True)
    _capture(session, nn.Sequential(nn.Identity()), values)
    session.close()
    packed = sink.tensors["step_0/0/outputs_cpu"]
    assert packed.shape == (2, 68) and packed.dtype == torch.int8
    scale = packed[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    torch.testing.assert_close(packed[:, :-4] * scale, values[[1, 6]], atol=0.03, rtol=0)


class _Two(nn.Module):
    """Calls one module with the step's rows, and one with as many rows as stay, which nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.other = nn.Identity(), nn.Identity()

    def forward(self, values: torch.Tensor) -> None:
        self.known(values)
        self.other(torch.ones(2, 2))


def test_what_was_stored_whole_has_no_rows_where_as_many_stay() -> None:
    sink = MemorySink()
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", "rows": "last"})
    session = Session(config, new_run(config), sink, inline=True)
    _capture(session, _Two(), VALUES)
    session.close()
    rows = CallRows(sink.steps[0].to_json(()))
    for name in ("known", "other"):
        full = f"step_0/{name}/outputs_cpu"
        record = {"name": full, "shape": [2, 2], "dtype": "float32"}
        assert sink.tensors[full].shape == (2, 2)
        # Both look alike, so that neither is given to anybody.
        assert rows.spans(record) == ()
