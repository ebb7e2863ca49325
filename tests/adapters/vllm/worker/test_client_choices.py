"""What requests choose of themselves, on a runner of the first version: what is stored, of which steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.adapters.vllm.worker.test_steps import Runner
from tests.sinks import MemorySink
from tlcore.adapters.vllm.worker.choices import LEFT_OUT, ClientChoices
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

ALL = ["enabled", "modules", "rows"]


def _output(new: dict[str, Any] | None = None) -> Any:
    """A step of b (1 token at position 4) and a (3 tokens from position 0), in this order."""
    counts = {"a": 3, "b": 1}
    listed = [
        SimpleNamespace(
            req_id=request,
            sampling_params=SimpleNamespace(extra_args=None if given is None else {"tlcore": given}),
            prompt_token_ids=[1] * 4,
            num_computed_tokens=0,
        )
        for request, given in (new or {}).items()
    ]
    return SimpleNamespace(
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=4,
        scheduled_new_reqs=listed,
        finished_req_ids=set(),
    )


class _Layers(Runner):
    """Three layers instead of one, and what such a runner keeps of its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        self.input = torch.arange(8.0).view(4, 2)
        self.requests: dict[str, Any] = {}


def _steps(new: dict[str, Any], steps: int = 2, runner: Any = None, **keys: Any) -> MemorySink:
    runner, sink = runner or _Layers(), MemorySink()
    config = load_config({"output_dir": "memory://unused", **keys})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner)
    for number in range(steps):
        runner.execute_model(_output(new if number == 0 else None))
        runner.sample_tokens(None)
    session.close()
    assert session.ledger.balanced
    return sink


def _kept(sink: MemorySink, step: int = 0) -> dict[str, list[int]]:
    """For each module the rows of its input, told by the first column of the first."""
    given = torch.arange(8.0).view(4, 2)
    found = {}
    for name, tensor in sink.tensors.items():
        if name.startswith(f"step_{step}/") and name.endswith("/inputs_0_cpu"):
            first = name.split("/")[1] == "0"
            places = [given[:, 0].tolist().index(row[0]) for row in tensor.tolist()] if first else []
            found[name.split("/")[1]] = places if first else [len(tensor)]
    return found


@pytest.mark.parametrize("overrides", [[], ALL])
def test_a_request_that_leaves_itself_out_is_not_stored(overrides: list[str]) -> None:
    for keys, rows in (({}, [0]), ({"request_ids": "a"}, []), ({"sample_rate": 1, "rows": "last"}, [0])):
        sink = _steps({"a": {"enabled": False}, "b": None}, 1, request_overrides=overrides, **keys)
        assert _kept(sink).get("0", []) == rows
        assert all(row["request_id"] == "b" for step in sink.steps for row in step.rows or ())


def test_the_native_half_takes_whole_tensors_again_after_such_a_step() -> None:
    runner, sink = _Layers(), MemorySink()
    config = load_config({"output_dir": "memory://unused", "log_step_ids": []})
    session = Session(config, new_run(config), sink, inline=True)
    session.attach(runner.model)
    StepWrapper(session, runner)
    for given in ({"b": None}, {"a": {"enabled": False}}, {"a": None}, None):
        output = _output(given)
        if given == {"a": None}:
            output.finished_req_ids = {"a"}
        runner.execute_model(output)
        runner.sample_tokens(None)
    session.close()
    assert [_kept(sink, step)["0"] for step in range(4)] == [[0, 1, 2, 3], [0], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_what_a_request_asks_for_is_stored_in_steps_that_nobody_selected() -> None:
    sink = _steps({"a": {"modules": ["1"]}}, 3, request_overrides=["modules"], log_step_ids=[1])
    assert [step.step for step in sink.steps] == [0, 1, 2]
    assert _kept(sink, 0) == {"1": [3]} == _kept(sink, 2)
    assert _kept(sink, 1)["0"] == [0] and _kept(sink, 1)["1"] == [4]
    assert [row["request_id"] for row in sink.steps[0].rows or ()] == ["a"]


def test_rows_are_narrowed_and_request_ids_do_not_matter() -> None:
    sink = _steps(
        {"a": {"rows": {"from": 1}}, "b": {"rows": "last"}}, 1, request_overrides=["rows"], request_ids="x"
    )
    assert _kept(sink)["0"] == [0, 2, 3]
    (step,) = sink.steps
    assert [(row["request_id"], row["first_position"]) for row in step.rows or ()] == [("b", 4), ("a", 1)]


@pytest.mark.parametrize("given", [{"rows": "last"}, {"enabled": True}, {"modules": ["0"]}])
def test_what_is_not_allowed_changes_nothing(given: dict[str, Any]) -> None:
    # Of a request from before the run; the front end refuses others.
    assert _kept(_steps({"a": given}, 1))["0"] == [0, 1, 2, 3]
    assert _steps({"a": given}, 2, log_step_ids=[7]).steps == []


def test_what_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert _kept(_steps({"a": "{"}, 1))["0"] == [0]
    assert "left out (said once)" in caplog.text


def test_of_earlier_requests_the_first_runner_knows_and_the_second_may_not() -> None:
    runner = _Layers()
    runner.requests["a"] = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={"tlcore": {"enabled": False}}), num_prompt_tokens=4
    )
    assert _kept(_steps({}, 1, runner))["0"] == [0]
    second = ClientChoices(SimpleNamespace())
    second.begin_run(load_config({}))
    second.begin_step(_output({"b": None}))
    assert second.of(["a", "b"]) == {"a": LEFT_OUT}
