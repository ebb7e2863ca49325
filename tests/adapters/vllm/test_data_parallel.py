"""A server of two data-parallel engines: each serves some of the requests, and both write into one run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import SEVERAL_RANKS, all_stored
from tests.adapters.vllm.server import serving
from tests.models import tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.deep]
PROMPTS = {f"R{number}": [10 + number, 20 + 2 * number, *range(3, 3 + number)] for number in range(8)}
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

        def ask(name: str) -> int:
            body = {"model": model, "prompt": PROMPTS[name], "max_tokens": TOKENS, "ignore_eos": True}
            return server.ask("/v1/completions", body, X_Request_Id=name)[0]

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(ask, PROMPTS)) == [200] * len(PROMPTS)
        server.end()

    (directory,) = (tmp_path / "dumps").iterdir()
    run = tlcore.open_run(directory)
    assert (run.state, run.world_size) == ("complete", 2)
    assert [(place["dp_rank"], place["dp_size"]) for place in run.ranks.values()] == [(0, 2), (1, 2)]
    assert run.verify() == run.ledger.stored and all_stored(run.ledger)
    served_by = set()
    for name, prompt in PROMPTS.items():
        request = run.request(f"cmpl-{name}-0")
        (ids,) = (each for each in request.names if each.startswith("model.embed_tokens/inputs"))
        served_by.add(ids.partition("_cpu")[2])
        assert request.positions(ids) == list(range(len(prompt) + TOKENS - 1))
        assert request.tensor(ids).tolist()[: len(prompt)] == prompt
    assert served_by == {"", "_rank_1"}
