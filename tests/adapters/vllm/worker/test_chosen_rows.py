"""`rows`, `request_ids` and `sample_rate` on a runner of the first version: what is stored, and its rows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.vllm.worker.test_steps import Runner, scheduled
from tests.sinks import MemorySink
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.filters.requests import request_filter
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.engine.staging.stager import Stager


def _step(runner: Runner, sink: MemorySink, **keys: Any) -> None:
    """One step of b (1 token at position 4) and a (3 tokens from position 0), in this order."""
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", **keys})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner)
    runner.execute_model(scheduled(a=3, b=1))
    runner.sample_tokens(None)
    session.close()
    assert session.ledger.balanced


def _rows(sink: MemorySink) -> list[tuple[Any, ...]]:
    (step,) = sink.steps
    keys = ("request_id", "first_row", "rows", "first_position")
    return [tuple(row[key] for key in keys) for row in step.rows or ()]


@pytest.mark.parametrize(
    ("keys", "rows", "kept"),
    [
        ({"rows": "last"}, [("b", 0, 1, 4), ("a", 1, 1, 2)], [0, 3]),
        ({"request_ids": "^a$"}, [("a", 0, 3, 0)], [1, 2, 3]),
        ({"request_ids": ["^a$"], "rows": "last"}, [("a", 0, 1, 2)], [3]),
        ({"request_ids": ["a", "b"]}, [("b", 0, 1, 4), ("a", 1, 3, 0)], [0, 1, 2, 3]),
    ],
)
def test_chosen_rows_are_stored_with_what_they_are(
    keys: dict[str, Any], rows: list[Any], kept: list[int]
) -> None:
    runner, sink = Runner(), MemorySink()
    runner.input = torch.arange(8.0).view(4, 2)
    _step(runner, sink, **keys)
    assert _rows(sink) == rows
    assert torch.equal(sink.tensors["step_0/0/inputs_0_cpu"], runner.input[kept])


@pytest.mark.parametrize(
    ("keys", "share"),
    [({}, 4), ({"rows": "last"}, 2), ({"request_ids": "b"}, 1), ({"rows": {"from": 1, "to": 3}}, 2)],
    ids=["all", "last", "one request", "window"],
)
def test_rows_are_cut_before_they_are_copied(
    keys: dict[str, Any], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = Stager._acquire

    def acquire(self: Stager, nbytes: int) -> Any:
        asked.append(nbytes)
        return original(self, nbytes)

    monkeypatch.setattr(Stager, "_acquire", acquire)
    runner, sink = Runner(), MemorySink()
    width = 1 << 20
    runner.model, runner.input = torch.nn.Sequential(torch.nn.Identity()), torch.ones(4, width)
    _step(runner, sink, module_call_match="^0$", **keys)
    # What goes in is what comes out, which is copied once or twice.
    stored = sum(each.nbytes for each in sink.tensors.values())
    assert stored >= share * width * 4 and sum(asked) <= stored + (1 << 20)


def test_a_step_without_a_chosen_request_is_counted_but_not_captured() -> None:
    runner, sink = Runner(), MemorySink()
    _step(runner, sink, request_ids="nobody")
    assert sink.steps == [] and sink.tensors == {}


def test_rows_that_are_not_known_for_certain_are_not_stored() -> None:
    runner, sink = Runner(), MemorySink()
    runner.positions.zero_()
    _step(runner, sink, rows="last")
    (step,) = sink.steps
    assert sink.tensors == {} and step.rows is None
    assert "positions" in step.extra["rows_unavailable"]
    assert step.counts.skipped == step.counts.captured == 4


def test_a_sample_is_the_same_in_every_run_and_about_as_large_as_asked() -> None:
    def chosen(rate: float, seed: int, suffix: str) -> list[int]:
        config = load_config({"sample_rate": rate, "sample_seed": seed})
        chooses = request_filter(config) or (lambda request: True)
        return [i for i in range(2000) if chooses(f"cmpl-{i}-0-{suffix}")]

    quarter = chosen(0.25, 0, "0123abcd")
    assert quarter == chosen(0.25, 0, "89abcdef")
    assert 400 < len(quarter) < 600
    assert set(quarter) < set(chosen(0.5, 0, "0123abcd"))
    assert quarter != chosen(0.25, 1, "0123abcd")
    assert (len(chosen(0, 0, "0123abcd")), len(chosen(1, 0, "0123abcd"))) == (0, 2000)


def test_a_request_is_in_the_sample_with_all_of_its_samples_or_none() -> None:
    chooses = request_filter(load_config({"sample_rate": 0.5})) or (lambda request: True)
    ids = [f"cmpl-{i}-0-0123abcd" for i in range(40)]
    chosen = [chooses(each) for each in ids]
    assert 5 < sum(chosen) < 35
    for sample in (0, 1, 13):
        assert [chooses(f"{sample}_{each}") for each in ids] == chosen


def test_of_a_long_id_the_beginning_is_searched() -> None:
    """A client may send megabytes, and a search may take the square of them."""
    chooses = request_filter(load_config({"request_ids": ["eval.*x", "end$"]})) or (lambda request: True)
    begin = time.process_time()
    assert not chooses("eval" * 250_000) and not chooses("a" * 300 + "end")
    assert chooses("a" * 100 + "eval-x" + "b" * 10**6) and chooses("the-end")
    assert time.process_time() - begin < 2


def test_numbers_of_the_runner_may_be_of_numpy() -> None:
    runner, sink = Runner(), MemorySink()
    runner.input_batch.num_computed_tokens_cpu = np.array([4, 0, 9], dtype=np.int32)
    _step(runner, sink, rows="last")
    assert _rows(sink)[1][3] == 2
