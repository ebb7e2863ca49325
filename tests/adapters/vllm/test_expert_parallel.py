"""A mixture of experts on two ranks, each with a part of every expert or with some whole ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import ENVIRONMENT, FORKED_RANKS, REPOSITORY, report
from tlcore.reader import Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "experts_script.py")
EXPERTS = "model.layers.0.block_sparse_moe.experts"
LAYOUTS = {
    "single": {},
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    out = tmp_path_factory.mktemp("experts")
    # The engine in the script's own process, which takes two processes less to start.
    environment = {**FORKED_RANKS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment["PYTHONPATH"] = f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{REPOSITORY}"
    tokens, found = [], {}
    for name, keywords in LAYOUTS.items():
        said: dict[str, Any] = report(
            SCRIPT, str(out / name), json.dumps(keywords), timeout=900, environment=environment
        )
        tokens.append(said["tokens"])
        (directory,) = Path(out / name).iterdir()
        found[name] = tlcore.open_run(directory)
    assert tokens[0] == tokens[1] == tokens[2]
    return found


@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_the_ranks_sums_are_added_up(layout: str, runs: dict[str, Run]) -> None:
    name = f"step_0/{EXPERTS}.routed_experts.quant_method/outputs_cpu"
    whole = runs["single"].tensor(name)
    assert torch.allclose(runs[layout].tensor(name, unshard=True), whole, rtol=1e-4, atol=1e-6)
    parts = [runs[layout].tensor(each) for each in (name, f"{name}_rank_1")]
    # Neither rank has the whole, and they are not the same.
    assert not any(torch.allclose(each, whole, rtol=0.1, atol=1e-5) for each in parts)
    assert not torch.allclose(parts[0], parts[1], rtol=0.1, atol=1e-5)
    if layout == "expert":
        ids = runs[layout].tensor(f"step_0/{EXPERTS}.routed_experts.quant_method/inputs_topk_ids_cpu")
        assert [place["ep_size"] for place in runs[layout].ranks.values()] == [2, 2]
        # The second rank has experts 2 and 3: of a token that chose none of them it has nothing.
        elsewhere = (ids < 2).all(-1)
        assert not parts[1][elsewhere].any() and parts[1][~elsewhere].any(-1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_experts_as_tokens_are_the_requests(layout: str, runs: dict[str, Run]) -> None:
    run, name = runs[layout], f"{EXPERTS}.routed_experts.quant_method/inputs_topk_ids_cpu"
    (request,) = (each for each in map(run.request, run.requests) if each.prompt_length == 2)
    chosen = run.tensor(f"step_{request.steps[0]}/{name}")
    assert chosen.shape == (2, 2) and torch.equal(request[name][:2], chosen)
    assert request.positions(name) == list(range(len(request[name]))) and len(request[name]) > 2


@pytest.mark.parametrize("pair", [("single", "tensor"), ("single", "expert"), ("tensor", "expert")])
def test_compare_finds_no_difference(pair: tuple[str, str], runs: dict[str, Run]) -> None:
    found = tlcore.compare(*(runs[each] for each in pair))
    assert found.equal, str(found)
    modules = {each.module for each in found.results}
    assert {EXPERTS, f"{EXPERTS}.routed_experts.quant_method"} <= modules
