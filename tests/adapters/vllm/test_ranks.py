"""Engines of two ranks, tensor and pipeline parallel, held against one of a single rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import FORKED_RANKS, REPOSITORY, SEVERAL_RANKS, all_stored, report
from tests.adapters.vllm.of_transformers import KINDS as OF_TRANSFORMERS
from tests.adapters.vllm.of_transformers import write_random
from tests.adapters.vllm.shared_layers import deepseek_v2, falcon_h1, lfm2
from tlcore.reader import Request, Run

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "ranks_script.py")
# The engines compute in bfloat16, and a sum over two ranks rounds once more than one over a single rank.
TOLERANCE = 2**-5


def _said(output_dir: Path, as_usual: bool = False, **keywords: Any) -> dict[str, Any]:
    # The engine runs in the script's own process, which takes a process less to start.
    environment = SEVERAL_RANKS if as_usual else {**FORKED_RANKS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return report(SCRIPT, str(output_dir), json.dumps(keywords), timeout=900, environment=environment)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _said(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _said(tmp_path_factory.mktemp("tensor"), as_usual=True, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def pipeline_parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _said(tmp_path_factory.mktemp("pipeline"), pipeline_parallel_size=2)


def _requests(said: Mapping[str, Any]) -> list[tuple[Request, int]]:
    """Each request with the length of its prompt: what follows may differ by rounding."""
    run = tlcore.open_run(said["url"])
    return [(run.request(each), n) for each, n in zip(said["requests"], said["prompt_lengths"], strict=True)]


def _error(one: Request, other: Request, name: str, prompt: int, other_name: str | None = None) -> float:
    """The relative error of a joined tensor over the prompt's positions; infinite for another shape."""
    there = other_name or name
    shared = [p for p in one.positions(name) if p < prompt and p in other.positions(there)]
    a, b = one.tensor(name, unshard=True), other.tensor(there, unshard=True)
    a = a[[one.positions(name).index(p) for p in shared]].float()
    b = b[[other.positions(there).index(p) for p in shared]].float()
    if a.shape != b.shape or not shared:
        return float("inf")
    return float((a - b).norm() / a.norm().clamp(min=1e-9))


def _one_directory(said: Mapping[str, Any]) -> Run:
    (directory,) = Path(said["url"]).parent.iterdir()
    assert str(directory) == said["url"]
    run = tlcore.open_run(directory)
    assert (run.state, run.world_size, said["status"]["state"]) == ("complete", 2, "closed")
    assert [each["rank"] for each in said["status"]["ranks"]] == [0, 1]
    assert said["status"]["ledger"] == run.ledger.to_json()
    assert run.verify() == run.ledger.stored > 300 and all_stored(run.ledger)
    assert said["unchanged"]
    return run


def test_tensor_parallel_ranks_share_a_run(tensor_parallel: dict[str, Any]) -> None:
    run = _one_directory(tensor_parallel)
    places = [
        (place["rank"], place["tp_rank"], place["tp_size"], place["pp_size"]) for place in run.ranks.values()
    ]
    assert places == [(0, 0, 2, 1), (1, 1, 2, 1)]
    step = run.step(0)
    own = [name for name in step.names if step.record(name)["rank"] == 0]
    assert sorted(f"{name}_rank_1" for name in own) == sorted(set(step.names) - set(own))
    local = step.tensor("step_0/model.layers.0.self_attn.qkv_proj/outputs_0_cpu")
    whole = step.tensor("step_0/model.layers.0.self_attn.qkv_proj/outputs_0_cpu", unshard=True)
    assert (local.shape[1], whole.shape[1]) == (128, 256)


def test_joined_tensors_are_those_of_a_single_rank(
    single: dict[str, Any], tensor_parallel: dict[str, Any]
) -> None:
    parts = 0
    for (one, prompt), (two, _) in zip(_requests(single), _requests(tensor_parallel), strict=True):
        assert set(one.names) <= set(two.names) and len(one.names) > 150
        worst = {name: _error(one, two, name, prompt) for name in one.names}
        assert max(worst.values()) < TOLERANCE, max(worst, key=lambda name: worst[name])
        parts += sum(two.tensor(name).shape != one.tensor(name).shape for name in one.names)
    # Projections, rotary embeddings, attention and activations: inputs, outputs or both, in four layers.
    assert parts >= 3 * 4 * 14


def test_parts_joined_in_a_wrong_order_would_be_found(
    single: dict[str, Any], tensor_parallel: dict[str, Any]
) -> None:
    (one, prompt), (two, _) = _requests(single)[0], _requests(tensor_parallel)[0]
    for module in ("self_attn.qkv_proj/outputs_0", "mlp.act_fn/outputs", "mlp.down_proj/inputs_0"):
        name = f"model.layers.1.{module}_cpu"
        mine = one.tensor(name)[:prompt].float()
        first, second = two.tensor(name)[:prompt].float(), two.tensor(f"{name}_rank_1")[:prompt].float()
        swapped = torch.cat([second, first], 1)
        assert float((mine - swapped).norm() / mine.norm()) > 10 * TOLERANCE


@pytest.mark.deep
@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_joined_tensors_of_transformers_code_are_those_of_a_single_rank(kind: str, tmp_path: Path) -> None:
    """Some have no projection that is known to be of queries, keys and values, and norms over all heads."""
    write_random(OF_TRANSFORMERS[kind], tmp_path / "model")
    _hold_against_a_single_rank(tmp_path)


@pytest.mark.deep
def test_joined_tensors_of_states_are_those_of_a_single_rank(tmp_path: Path) -> None:
    write_random(falcon_h1, tmp_path / "model")
    _hold_against_a_single_rank(tmp_path)


def _joined_in(layer: int, make: Callable[[], Any], tmp_path: Path) -> Callable[[str], torch.Tensor]:
    """Two ranks' tensors of a layer's attention in the first step, joined, by their names there."""
    write_random(make, tmp_path / "model")
    keywords: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "tensor_parallel_size": 2,
    }
    step = tlcore.open_run(_said(tmp_path / "run", **keywords)["url"]).step(0)
    return lambda name: step.tensor(f"step_0/model.layers.{layer}.self_attn.{name}_cpu", unshard=True)


@pytest.mark.deep
def test_latent_attention_is_joined_as_what_is_around_it(tmp_path: Path) -> None:
    """Not held against a single rank: uncompiled, vLLM 0.32 turns these queries wrongly on CPUs."""
    whole = _joined_in(0, deepseek_v2, tmp_path)
    queries, projected = whole("mla_attn.mla_attn/inputs_0"), whole("q_proj/outputs_0")
    assert queries.shape[1:] == (4, 96)
    assert torch.equal(queries[..., :32], projected.view(-1, 4, 96)[..., :32])
    assert torch.equal(queries[..., 32:], whole("rotary_emb/outputs_0"))
    result = whole("mla_attn.mla_attn/outputs")
    assert result.shape[1] == 4 * 32 and torch.equal(result, whole("o_proj/inputs_0"))


def _hold_against_a_single_rank(tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"model": str(tmp_path / "model"), "dtype": "float32"}
    single = _said(tmp_path / "single", **keywords)
    parallel = _said(tmp_path / "parallel", tensor_parallel_size=2, **keywords)
    found = tlcore.compare(single["url"], parallel["url"], rtol=2**-10, by_norm=True)
    assert {name for name, count in found.counts.items() if count} == {"bitwise", "close"}
    for (one, prompt), (two, _) in zip(_requests(single), _requests(parallel), strict=True):
        assert set(one.names) <= set(two.names) and len(one.names) > 100
        assert max(_error(one, two, name, prompt) for name in one.names) < 2**-10


@pytest.mark.deep
def test_norms_of_heads_are_joined_as_what_is_before_them(tmp_path: Path) -> None:
    """Not held against a single rank either, for the same reason."""
    whole = _joined_in(1, lfm2, tmp_path)
    heads = whole("qkv_proj/outputs_0").view(-1, 8, 32)
    assert torch.equal(whole("q_layernorm/inputs_0"), heads[:, :4])
    assert torch.equal(whole("k_layernorm/inputs_0"), heads[:, 4:6])
    assert whole("q_layernorm/outputs").shape[1:] == (4, 32)


def test_pipeline_stages_share_a_run(single: dict[str, Any], pipeline_parallel: dict[str, Any]) -> None:
    run = _one_directory(pipeline_parallel)
    assert [(place["pp_rank"], place["pp_size"], place["tp_size"]) for place in run.ranks.values()] == [
        (0, 2, 1),
        (1, 2, 1),
    ]
    ranks = {record["module"]: record["rank"] for record in run.step(0).records}
    assert [ranks[f"model.layers.{i}.mlp"] for i in range(4)] == [0, 0, 1, 1]
    assert (ranks["model.embed_tokens"], ranks["model.norm"], ranks["logits_processor"]) == (0, 1, 1)
    for (one, prompt), (two, _) in zip(_requests(single), _requests(pipeline_parallel), strict=True):
        for layer in range(4):
            name = f"model.layers.{layer}.mlp/outputs_cpu"
            there = name if layer < 2 else f"{name}_rank_1"
            assert _error(one, two, name, prompt, there) < TOLERANCE


def test_compare_joins_the_parts(single: dict[str, Any], tensor_parallel: dict[str, Any]) -> None:
    found = tlcore.compare(single["url"], tensor_parallel["url"], rtol=TOLERANCE, by_norm=True)
    assert (found.counts["missing"], found.counts["unreadable"]) == (0, 0)
    assert found.counts["close"] + found.counts["bitwise"] > 3 * 150
    lengths = dict(zip(single["requests"], single["prompt_lengths"], strict=True))
    for each in found.results:
        # What follows the prompt may be another token.
        assert each.agrees or (each.first_position or 0) >= lengths[str(each.request)], each


def test_compare_finds_the_stages_tensors(single: dict[str, Any], pipeline_parallel: dict[str, Any]) -> None:
    found = tlcore.compare(single["url"], pipeline_parallel["url"], rtol=TOLERANCE, by_norm=True)
    assert (found.counts["different"], found.counts["unreadable"]) == (0, 0)
    assert found.counts["close"] + found.counts["bitwise"] > 3 * 250
    # What one stage sends to the next is no tensor of a single rank; and the layers share one rotary
    # embedding, of which each stage has its own.
    only_one_has = {each.module for each in found.results if each.status == "missing"}
    assert only_one_has == {"", "model", *(f"model.layers.{i}.self_attn.rotary_emb" for i in (0, 2))}
