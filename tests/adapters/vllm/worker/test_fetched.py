"""Requests that are fetched: in which steps they were captured, and when that is stored."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.adapters.vllm.worker.test_client_choices import _Layers, _output
from tests.sinks import MemorySink
from tests.waiting import wait_until
from tlcore.adapters.vllm.frontend.fetching import (
    Flush,
    LostError,
    NothingError,
    as_safetensors,
    described,
    size_of,
    stored_request,
)
from tlcore.adapters.vllm.worker.capture import WorkerCapture
from tlcore.adapters.vllm.worker.fetched import Fetched, Flushes
from tlcore.adapters.vllm.worker.run_end import Runs
from tlcore.adapters.vllm.worker.steps import StepWrapper
from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.reader.step import Step


class _SlowSink(MemorySink):
    """Commits a step only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def commit_step(self, step: Any) -> None:
        assert self.go_on.wait(60)
        super().commit_step(step)


def _session(sink: MemorySink, **keys: Any) -> tuple[Session, _Layers, StepWrapper]:
    config = load_config({"output_dir": "memory://unused", "log_step_ids": [10**6], **keys})
    session = Session(config, new_run(config), sink)
    runner = _Layers()
    session.attach(runner.model)
    return session, runner, StepWrapper(session, runner)


def _step(runner: _Layers, new: dict[str, Any] | None = None) -> None:
    runner.execute_model(_output(new))
    runner.sample_tokens(None)


def test_a_request_that_is_fetched_is_captured_in_all_its_steps_which_are_noted() -> None:
    sink = MemorySink()
    session, runner, wrapper = _session(sink, delivery=True)
    for new in ({"a": {"deliver": True}}, None, None):
        _step(runner, new)
    assert wrapper.fetched.of(["a", "b"]) == {
        "a": {"run_id": session.run_id, "url": session.url, "steps": [0, 1, 2]}
    }
    session.close()
    assert [step.step for step in sink.steps] == [0, 1, 2]
    assert all(row["request_id"] == "a" for step in sink.steps for row in step.rows or ())


def test_where_nothing_is_delivered_nothing_is_noted() -> None:
    session, runner, wrapper = _session(MemorySink())
    _step(runner, {"a": {"deliver": True}, "b": {"deliver": True, "enabled": False}})
    assert wrapper.fetched.of(["a", "b"]) == {} and session.captured_steps == 0
    session.close()


def test_a_flush_is_over_when_what_was_captured_before_it_is_stored() -> None:
    sink = _SlowSink()
    session, runner, _ = _session(sink, delivery=True)
    flushes = Flushes()
    _step(runner, {"a": {"deliver": True}})
    assert not flushes.done("first", session) and not flushes.done("first", session)
    sink.go_on.set()
    session.flush()
    assert flushes.done("first", session) and [step.step for step in sink.steps] == [0]
    session.close()
    assert flushes.done("second", session) and flushes.done("third", None)


def test_a_flush_asked_for_within_a_step_is_over_after_it() -> None:
    sink = MemorySink()
    session, runner, wrapper = _session(sink, delivery=True)
    runner.execute_model(_output({"a": {"deliver": True}}))
    worker: Any = SimpleNamespace(
        _bracket=wrapper, _session=session, _runs=Runs(), _flushes=Flushes(), _rank=0
    )
    told = WorkerCapture.flush(worker, "first", ["a"])
    assert told["requests"]["a"]["steps"] == [0] and not told["done"]
    runner.sample_tokens(None)
    wait_until(lambda: WorkerCapture.flush(worker, "first", ["a"])["done"], "the request is done")
    assert [step.step for step in sink.steps] == [0]
    session.close()


def test_the_oldest_are_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr("tlcore.adapters.vllm.worker.fetched._MOST_REQUESTS", 2)
    fetched = Fetched()
    session: Any = SimpleNamespace(run_id="r", url="u", step=5)
    fetched.note(session, ["a", "b", "c"])
    assert list(fetched.of(["a", "b", "c"])) == ["b", "c"]


@pytest.mark.parametrize("backend", ["safetensors", "pt"])
def test_what_is_stored_is_joined_while_the_run_goes_on(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"output_dir": str(tmp_path), "backend": backend, "delivery": True}
    config = load_config({**keys, "log_step_ids": [10**6], "request_overrides": ["modules", "rows"]})
    session = Session(config, new_run(config))
    runner = _Layers()
    session.attach(runner.model)
    wrapper = StepWrapper(session, runner)
    chosen = {"deliver": True, "modules": ["1", "2"]}
    _step(runner, {"a": chosen, "b": {**chosen, "rows": {"from": 100}}})
    asked = ["a"]
    known = {**wrapper.fetched.of(asked)["a"], "steps": [0, 7]}
    late = [{"rank": 0, "requests": {"a": known}, "problem": "full"}]
    session.flush()
    with pytest.raises(LostError, match=r"step 7 of the run could not be stored by every rank, .*: full"):
        stored_request(Flush(late), "a", lambda url: None)
    both = Flush([{"rank": 0, "requests": wrapper.fetched.of(["a", "b"])}])
    with pytest.raises(NothingError, match="nothing was captured of this request"):
        # It shared the step, and has none of its rows.
        stored_request(both, "b", lambda url: None)
    found = stored_request(both, "a", lambda url: None)
    tensors = load(as_safetensors(found))
    assert set(tensors) == {f"{layer}/{stem}" for layer in "12" for stem in ("inputs_0", "outputs")}
    assert size_of(found) == sum(each.nbytes for each in tensors.values())
    monkeypatch.setattr(Step, "tensor", None)
    said = described(found, "cmpl-x", 3)
    assert (said["id"], said["index"], said["steps"], said["run"]) == ("cmpl-x", 3, [0], session.url)
    entry = said["tensors"]["2/outputs"]
    assert entry == {"dtype": "float32", "shape": [3, 2], "positions": [0, 1, 2], "gaps": []}
    with torch.no_grad():
        expected = runner.model(runner.input)[1:]
    assert torch.allclose(tensors["2/outputs"], expected) and said["token_ids"] is None
    session.close()
