"""A server of two data-parallel engines: each serves some of the requests, and both write into one run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import SEVERAL_RANKS, all_stored
from tests.adapters.vllm.server import serving
from tests.models import tiny_llama
from tests.servers import free_ports
from tests.waiting import wait_until
from tlcore.adapters.vllm.plugins import ENDPOINT, PLUGIN

pytestmark = [pytest.mark.slow, pytest.mark.deep]
PROMPTS = [[10 + number, 20 + 2 * number, *range(3, 3 + number)] for number in range(8)]
TOKENS = 3


def test_each_request_is_found_whichever_engine_served_it(tmp_path: Path) -> None:
    model = str(tiny_llama())
    settings: dict[str, Any] = {
        "model": model,
        "data-parallel-size": 2,
        "enforce-eager": True,
        "max-model-len": 256,
        "intermediate-log-config": {"output_dir": str(tmp_path / "dumps"), "log_step_ids": []},
    }
    with serving(tmp_path, settings, SEVERAL_RANKS) as server:
        (directory,) = (tmp_path / "dumps").iterdir()
        asked: dict[str, list[int]] = {}

        def ask(name: str) -> int:
            body = {"model": model, "prompt": asked[name], "max_tokens": TOKENS, "ignore_eos": True}
            return server.ask("/v1/completions", body, X_Request_Id=name)[0]

        def served() -> bool:
            """Requests that come one after the other may all go to one engine."""
            new = {f"R{len(asked) + place}": prompt for place, prompt in enumerate(PROMPTS)}
            asked.update(new)
            assert list(pool.map(ask, new)) == [200] * len(new)
            return all(list(directory.glob(f"step_*/{name}")) for name in ("step.json", "step_rank_1.json"))

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            wait_until(served, "both engines have served some")
        server.end()

    run = tlcore.open_run(directory)
    assert (run.state, run.world_size) == ("complete", 2)
    assert [(place["dp_rank"], place["dp_size"]) for place in run.ranks.values()] == [(0, 2), (1, 2)]
    assert run.verify() == run.ledger.stored and all_stored(run.ledger)
    served_by = set()
    for name, prompt in asked.items():
        request = run.request(f"cmpl-{name}-0")
        (ids,) = (each for each in request.names if each.startswith("model.embed_tokens/inputs"))
        served_by.add(ids.partition("_cpu")[2])
        positions = request.positions(ids)
        # Of one that came again the prompt's beginning may be cached.
        assert positions == list(range(positions[0], len(prompt) + TOKENS - 1))
        assert request.tensor(ids).tolist()[: len(prompt) - positions[0]] == prompt[positions[0] :]
    assert served_by == {"", "_rank_1"}


def test_front_ends_behind_a_hybrid_load_balancer_have_a_run_each(tmp_path: Path) -> None:
    """Each has two of four engines, which only start together, and nothing to do with the others'."""
    model, key = str(tiny_llama()), "a-key"
    (meeting,) = free_ports(1)
    settings: dict[str, Any] = {
        "model": model,
        "data-parallel-size": 4,
        "data-parallel-size-local": 2,
        "data-parallel-hybrid-lb": True,
        "data-parallel-rpc-port": meeting,
        "api-server-count": 1,
        "api-key": key,
        "enforce-eager": True,
        "max-model-len": 256,
    }
    environment = SEVERAL_RANKS | {
        "VLLM_PLUGINS": f"{PLUGIN},{ENDPOINT}",
        "TLCORE_ENDPOINT_OUTPUT_DIR": str(tmp_path / "dumps"),
    }
    everyone = Barrier(2)

    def serve(first: int) -> str:
        directory = tmp_path / f"from_{first}"
        directory.mkdir()
        with serving(directory, settings | {"data-parallel-start-rank": first}, environment) as server:
            started, begun = server.ask("/v1/tlcore/start", {"log_step_ids": []}, key)
            assert (started, [each["rank"] for each in begun["ranks"]]) == (200, [0, 1]), begun
            for number in range(4):
                body = {
                    "model": model,
                    "prompt": [first, number, 5],
                    "max_tokens": TOKENS,
                    "ignore_eos": True,
                }
                assert server.ask("/v1/completions", body, key, X_Request_Id=f"R{number}")[0] == 200
            ended = server.ask("/v1/tlcore/stop", {}, key)[1]
            assert (ended["state"], ended["run_id"]) == ("closed", begun["run_id"])
            everyone.wait(600)
            return str(begun["url"])

    with ThreadPoolExecutor(2) as pool:
        urls = dict(zip((0, 2), pool.map(serve, (0, 2)), strict=True))
    for first, url in urls.items():
        run = tlcore.open_run(url)
        assert (run.state, run.world_size, len(run.ranks)) == ("complete", 2, 2)
        assert run.verify() == run.ledger.stored
        prompts = {tuple(run.request(f"cmpl-R{number}-0").token_ids[:3].tolist()) for number in range(4)}
        assert prompts == {(first, number, 5) for number in range(4)}
