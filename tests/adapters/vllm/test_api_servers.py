"""Two API servers before two engines: whichever answers speaks for all, and of several starts one wins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from safetensors.torch import load

import tlcore
from tests.adapters.vllm.client import KEY, MLP, complete, fetch
from tests.adapters.vllm.helpers import SEVERAL_RANKS
from tests.adapters.vllm.server import FEWER_PROCESSES, VllmServer, serving
from tests.adapters.vllm.truth import Truth
from tests.models import tiny_llama
from tests.waiting import wait_until
from tlcore.adapters.vllm.frontend.endpoint import DELIVERY_VARIABLE, ROOT_VARIABLE

pytestmark = pytest.mark.slow
REQUESTS = 8
LAYER = "model.layers.2/outputs"
METRIC = re.compile(r'^tlcore_captured_tensors_total\{rank="(\d)"\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    settings = {
        "model": str(tiny_llama()),
        "served-model-name": "tiny",
        "enforce-eager": True,
        "dtype": "float32",
        "max-model-len": 256,
        "api-key": KEY,
        "api-server-count": 2,
        "data-parallel-size": 2,
        # What is asked of the servers is the same of any model; of this kind nothing is fetched elsewhere.
        "model-impl": "transformers",
    }
    environment = {
        **SEVERAL_RANKS,
        **FEWER_PROCESSES,
        "VLLM_PLUGINS": "tlcore,tlcore.endpoint",
        DELIVERY_VARIABLE: "1",
        ROOT_VARIABLE: str(tmp_path_factory.mktemp("captured")),
    }
    with serving(tmp_path_factory.mktemp("server"), settings, environment) as running:
        yield running


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(REQUESTS) as made:
        yield made


def _start(server: VllmServer) -> tuple[int, dict[str, Any]]:
    return server.ask("/v1/tlcore/start", {"log_step_ids": [], "module_call_match": "mlp$"}, KEY)


def _states(server: VllmServer) -> set[tuple[int, str, str]]:
    answers = [server.ask("/v1/tlcore/status", key=KEY) for _ in range(8)]
    return {(status, answer["state"], answer["url"]) for status, answer in answers}


def test_of_several_starts_at_once_exactly_one_wins_and_runs_on(
    server: VllmServer, pool: ThreadPoolExecutor
) -> None:
    for _ in range(3):
        answers = list(pool.map(lambda _: _start(server), range(4)))
        (won,) = (answer for status, answer in answers if status == 200)
        assert [status for status, _ in answers if status != 200] == [409] * 3, answers
        assert [rank["state"] for rank in won["ranks"]] == ["running"] * 2
        assert _states(server) == {(200, "running", won["url"])}

        status, refused = server.ask("/v1/tlcore/stop", {"run_id": "another"}, KEY)
        assert status == 409 and "no run another" in refused["error"]["message"]
        assert _states(server) == {(200, "running", won["url"])}
        status, stopped = server.ask("/v1/tlcore/stop", {"run_id": won["run_id"]}, KEY)
        assert (status, stopped["state"], stopped["url"]) == (200, "closed", won["url"])
    path = f"/v1/tlcore/status?run_id={won['run_id']}"
    assert server.ask(path, key=KEY) == (200, stopped)


def test_ledger_and_metrics_speak_for_all_engines(server: VllmServer, pool: ThreadPoolExecutor) -> None:
    status, started = _start(server)
    assert status == 200 and [rank["rank"] for rank in started["ranks"]] == [0, 1], started

    def ask(number: int) -> int:
        body = {"model": "tiny", "prompt": [9, 8, 10 + number % 400], "max_tokens": 3, "ignore_eos": True}
        return server.ask("/v1/completions", body, KEY, X_Request_Id=f"R{number}")[0]

    asked = 0

    def served() -> bool:
        """Requests that come one after the other may all go to one engine."""
        nonlocal asked
        assert list(pool.map(ask, range(asked, asked + REQUESTS))) == [200] * REQUESTS
        asked += REQUESTS
        ranks = server.ask("/v1/tlcore/status", key=KEY)[1]["ranks"]
        return all(rank["ledger"]["captured"] > 0 for rank in ranks)

    wait_until(served, "both engines have served some")
    status, stopped = server.ask("/v1/tlcore/stop", b"", KEY)
    assert (status, stopped["state"], stopped["problem"]) == (200, "closed", None)
    run = tlcore.open_run(stopped["url"])
    assert (run.state, len(run.requests)) == ("complete", asked)
    assert stopped["ledger"] == run.ledger.to_json() and run.ledger.stored == run.verify() > 0
    by_rank = {rank["rank"]: rank["ledger"]["captured"] for rank in stopped["ranks"]}
    assert sorted(by_rank) == [0, 1] and min(by_rank.values()) > 0

    def shown() -> list[dict[int, float]]:
        texts = [server.text("/metrics") for _ in range(6)]
        return [{int(rank): float(value) for rank, value in METRIC.findall(text)} for text in texts]

    wait_until(lambda: shown() == [by_rank] * 6, "each API server shows both ranks' tensors", 60)
    assert "vllm:num_requests_running" in server.text("/metrics")


def test_whichever_answers_delivers_the_same(server: VllmServer, pool: ThreadPoolExecutor) -> None:
    modules = r"layers\.2(\.mlp)?$"
    config = {"log_step_ids": [], "sample_rate": 0, "module_call_match": modules, "delivery": True}
    status, started = server.ask("/v1/tlcore/start", config, KEY)
    assert status == 200, started

    def one(number: int) -> list[bytes]:
        answer = complete(server, f"own{number}", {"deliver": True}, prompt=[9, 8, 10 + number])
        assert answer.status == 200, answer.body
        # Either API server knows the id, and refuses it to another.
        assert {complete(server, f"own{number}", {"deliver": True}).status for _ in range(4)} == {409}
        assert fetch(server, f"cmpl-own{number}", answer.token[:-1]).status == 404
        found = [fetch(server, f"cmpl-own{number}.safetensors", answer.token) for _ in range(4)]
        assert [each.status for each in found] == [200] * 4, found[0].body
        return [each.body for each in found]

    truth = Truth(tiny_llama())
    for number, bodies in enumerate(pool.map(one, range(REQUESTS))):
        (body,) = set(bodies)
        tensors = load(body)
        ids = tensors["token_ids"].tolist()
        assert ids[:3] == [9, 8, 10 + number] and tensors[MLP].shape == (5, 128)
        assert truth.agrees(tensors[LAYER], ids, list(range(5)), 3)
    assert server.ask("/v1/tlcore/stop", b"", KEY)[1]["state"] == "closed"
