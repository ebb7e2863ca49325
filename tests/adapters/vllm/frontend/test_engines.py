"""Several API servers before several engines, with every order in which their calls can reach the workers.

The plugin of the API servers and the workers' side are the real ones; only vLLM's calls between them are
replaced by waits of random length.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

import tlcore
from tlcore.adapters.vllm.frontend.endpoint import ROOT_VARIABLE, EndpointPlugin
from tlcore.adapters.vllm.frontend.engines import DeadEngineError
from tlcore.adapters.vllm.worker import capture as worker_capture
from tlcore.errors import CaptureError

ENGINES = 2
SEEDS = 8


class Worker:
    """A worker of vLLM's form, with a model of one layer."""

    def __init__(self, index: int) -> None:
        self.rank = 0
        self.vllm_config = _vllm_config(index)
        model = nn.Sequential(nn.Linear(2, 2))
        nothing = lambda *args, **kwargs: None  # noqa: E731
        self.model_runner = SimpleNamespace(
            execute_model=nothing,
            sample_tokens=nothing,
            get_model=lambda: model,
            vllm_config=self.vllm_config,
        )
        for name in ("load_model", "shutdown", *worker_capture.WARM_UP):
            setattr(self, name, nothing)


def _vllm_config(index: int = 0) -> Any:
    parallel = SimpleNamespace(
        world_size=1,
        data_parallel_size=ENGINES,
        data_parallel_index=index,
        tensor_parallel_size=1,
        prefill_context_parallel_size=1,
        pipeline_parallel_size=1,
    )
    compilation = SimpleNamespace(mode="NONE", cudagraph_mode="NONE")
    return SimpleNamespace(parallel_config=parallel, compilation_config=compilation)


class Client:
    """One API server's way to the engines: each call arrives some time later, each engine by itself."""

    def __init__(self, workers: list[Worker], chance: random.Random) -> None:
        self.workers, self.chance = workers, chance
        self.vllm_config = _vllm_config()
        self.engine_core = self
        self.core_engines = list(range(len(workers)))
        self.resources = SimpleNamespace(engine_dead=False)
        self.answers = True
        self.failure: Exception | None = None

    async def _call_utility_async(self, utility: str, method: str, *rest: Any, engine: int) -> Any:
        await asyncio.sleep(self.chance.random() * 0.004)
        if not self.answers:
            await asyncio.sleep(600)
        if self.failure is not None:
            raise self.failure
        act = getattr(worker_capture, method.removeprefix("tlcore"))
        answer = act(self.workers[engine], *rest[1])
        await asyncio.sleep(self.chance.random() * 0.002)
        return [answer]


class Request:
    """What a route is asked with."""

    def __init__(self, document: Any = None, **query: str) -> None:
        self.text = b"" if document is None else json.dumps(document).encode()
        self.query_params = query

    async def body(self) -> bytes:
        return self.text


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = ModuleType("vllm")
    stand_in.__dict__["__version__"] = "0"
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(worker_capture, "check_place", lambda place: None)
    monkeypatch.setattr(worker_capture, "_sharding", lambda worker: {})
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "runs"))


def _plugins(chance: random.Random, count: int = 2) -> tuple[list[Any], list[Worker]]:
    workers = [Worker(index) for index in range(ENGINES)]
    plugins = []
    for _ in range(count):
        plugin: Any = EndpointPlugin()
        plugin._engine, plugin._guarded = Client(workers, chance), True
        plugins.append(plugin)
    return plugins, workers


async def _ended(plugin: Any) -> Any:
    """The status once no rank goes on storing: the stop after a start that failed does not wait for that."""
    end = time.monotonic() + 60
    while True:
        status = await plugin._status(Request())
        if not any(rank["state"] == "closing" for rank in status.ranks):
            return status
        assert time.monotonic() < end, status
        await asyncio.sleep(0.005)


async def _race(seed: int) -> None:
    chance = random.Random(seed)
    plugins, _ = _plugins(chance)

    async def start(number: int) -> Any:
        await asyncio.sleep(chance.random() * 0.02)
        try:
            return await plugins[number % 2]._start(Request({"log_step_ids": []}))
        except CaptureError as error:
            return error

    answers = await asyncio.gather(*map(start, range(4)))
    won = [answer for answer in answers if not isinstance(answer, CaptureError)]
    assert len(won) == 1, answers
    for plugin in plugins:
        status = await plugin._status(Request())
        assert [(rank["rank"], rank["state"], rank["run_id"]) for rank in status.ranks] == [
            (rank, "running", won[0].run_id) for rank in range(ENGINES)
        ]
    with pytest.raises(CaptureError, match="no run another"):
        await plugins[0]._stop(Request({"run_id": "another"}))
    stopped = await plugins[1]._stop(Request())
    assert (stopped.state, stopped.run_id) == ("closed", won[0].run_id)
    assert await plugins[0]._status(Request(run_id=stopped.run_id)) == stopped
    assert tlcore.open_run(stopped.url).state == "complete"


def test_of_several_starts_at_once_exactly_one_wins_and_runs_on() -> None:
    for seed in range(SEEDS):
        try:
            asyncio.run(_race(seed))
        except BaseException as error:
            raise AssertionError(f"order {seed}: {error}") from error


async def _start_against_stop(seed: int) -> None:
    chance = random.Random(seed)
    plugins, _ = _plugins(chance)
    first = await plugins[0]._start(Request({}))

    async def start() -> Any:
        await asyncio.sleep(chance.random() * 0.02)
        try:
            return await plugins[1]._start(Request({}))
        except CaptureError as error:
            return error

    stopped, started = await asyncio.gather(plugins[0]._stop(Request()), start())
    # Whoever was asked to end has ended, and is what the answer speaks of; the other has begun whole or not.
    assert (stopped.state, stopped.run_id) == ("closed", first.run_id)
    status = await _ended(plugins[0])
    if isinstance(started, CaptureError):
        assert status.state == "closed"
    else:
        assert {rank["run_id"] for rank in status.ranks} == {started.run_id} and status.state == "running"
        assert [rank["state"] for rank in status.ranks] == ["running"] * ENGINES
        await plugins[0]._stop(Request())


def test_a_stop_ends_the_run_that_it_was_meant_for() -> None:
    for seed in range(SEEDS):
        try:
            asyncio.run(_start_against_stop(seed))
        except BaseException as error:
            raise AssertionError(f"order {seed}: {error}") from error


def test_a_refusal_of_any_engine_is_told_and_nothing_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused() -> None:
        plugins, workers = _plugins(random.Random(0), 1)
        monkeypatch.setattr(workers[1].model_runner, "get_model", lambda: 1 / 0)
        with pytest.raises(CaptureError, match="rank 1: ZeroDivisionError"):
            await plugins[0]._start(Request({}))
        status = await _ended(plugins[0])
        assert [rank["state"] for rank in status.ranks] == ["closed", "idle"]

    asyncio.run(refused())


@pytest.mark.parametrize("how", ["before it answers", "a moment after its call failed"])
def test_an_engine_that_dies_is_told(how: str) -> None:
    """A worker that is killed lets vLLM's call fail a moment before its engine counts as dead."""

    async def dies() -> None:
        plugins, _ = _plugins(random.Random(0), 1)
        client = plugins[0]._engine
        if how == "before it answers":
            client.answers = False
        else:
            client.failure = RuntimeError("Call to collective_rpc method failed: cancelled")
        asked = asyncio.ensure_future(plugins[0]._status(Request()))
        await asyncio.sleep(0.05)
        client.resources.engine_dead = True
        with pytest.raises(DeadEngineError, match="has died"):
            await asyncio.wait_for(asked, 30)

    asyncio.run(dies())
