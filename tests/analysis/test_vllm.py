"""Real vLLM runs of SmolLM2-135M, against each other per request and against Hugging Face's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tlcore
from tests.adapters.vllm.engine_script import PROMPTS
from tests.adapters.vllm.helpers import REPOSITORY, run_script
from tests.analysis.vllm_script import ALONE, DTYPE
from tests.models import smollm2
from tlcore.__main__ import main
from tlcore.analysis.results import Comparison

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "analysis" / "vllm_script.py")


# Both add up in float32, but in another order: layers of thousands agree to some 1e-6 of their norm.
TWO_IMPLEMENTATIONS = ["--rtol", "1e-4", "--atol", "1e-5"]


def _served(directory: Path, order: list[int], max_num_seqs: int) -> str:
    done = run_script(SCRIPT, str(smollm2()), str(directory), json.dumps(order), str(max_num_seqs))
    assert done.returncode == 0, done.stdout + done.stderr
    (run_directory,) = directory.iterdir()
    return str(run_directory)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _served(tmp_path_factory.mktemp("ordered") / "dumps", list(range(8)), 8)


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _served(tmp_path_factory.mktemp("reordered") / "dumps", [5, 2, 7, 0, 3, 6, 1, 4], 3)


@pytest.fixture(scope="module")
def transformers_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _in_transformers(tmp_path_factory.mktemp("transformers"))


def _in_transformers(directory: Path, fault: str = "") -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=getattr(torch, DTYPE)).eval()
    if fault:
        model.get_submodule(fault).weight.data[3] += 0.1
    tokens = AutoTokenizer.from_pretrained(smollm2())(ALONE, return_tensors="pt").input_ids
    with torch.inference_mode(), tlcore.capture(model, output_dir=str(directory)) as captured:
        model(tokens)
    return captured.url


def test_eight_prompts_in_other_orders_and_batches_compare_per_request(ordered: str, reordered: str) -> None:
    a, b = tlcore.open_run(ordered), tlcore.open_run(reordered)
    # The same prompts under other ids, in other steps and other rows.
    assert max(len(step.rows or ()) for step in a.values()) == 8
    assert max(len(step.rows or ()) for step in b.values()) == 3
    assert len(b.steps) > len(a.steps)
    found = tlcore.compare(a, b, by_norm=True)
    assert found.equal, str(found)
    assert found.counts["missing"] == 0
    assert len({result.request for result in found.results}) == len(PROMPTS) + 1
    assert not [note for note in found.notes if "request" in note]
    # Every position of every request: the prompt's and those of the two tokens fed back.
    layer = [r for r in found.results if r.module == "model.layers.29" and r.direction == "outputs"]
    rows = {(row["request_id"]): 0 for step in a.values() for row in step.rows or ()}
    assert len({r.request for r in layer if r.path == (0,)}) == len(rows)


def test_ids_alone_would_mistake_one_request_for_another(ordered: str, reordered: str) -> None:
    ids = [{row["external_request_id"] for s in tlcore.open_run(r).values() for row in s.rows or ()}
           for r in (ordered, reordered)]  # fmt: skip
    assert ids[0] == ids[1]
    swapped = tlcore.compare(ordered, reordered, requests={"1": "1"}, by_norm=True)
    assert not swapped.equal
    first = swapped.first_divergence
    assert first is not None and first.result.request == "1" and first.module == "model.embed_tokens"


def test_vllm_against_transformers_layer_by_layer(
    ordered: str, transformers_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", ordered, transformers_run, "--steps", "0", "--sum", "hidden,residual", "--by-norm"]
    command += ["--modules", r"embed_tokens$,layers\.\d+$", "--ignore-missing", "--format", "json"]
    command += TWO_IMPLEMENTATIONS
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    errors = {
        (result["module"], result["direction"]): result["measures"]["rel_l2"] for result in report["results"]
    }
    # Layer by layer: both what goes in (hidden and residual are two inputs in vLLM) and what comes out.
    for layer in range(30):
        for direction in ("inputs", "outputs"):
            assert errors[f"model.layers.{layer}", direction] <= 1e-4
    assert errors["model.embed_tokens", "outputs"] == 0
    assert errors["model.layers.29", "outputs"] > 0


def test_vllm_against_transformers_needs_the_sum(ordered: str, transformers_run: str) -> None:
    layer = [r"layers\.20$"]
    bridged = {
        "steps": [0],
        "modules": layer,
        "by_norm": True,
        "ignore_missing": True,
        "rtol": 1e-4,
        "atol": 1e-5,
    }
    assert tlcore.compare(ordered, transformers_run, sums=[0, 1], **bridged).equal  # type: ignore[arg-type]
    # The hidden state alone is far off.
    alone = tlcore.compare(ordered, transformers_run, maps=["x=x"], **bridged)  # type: ignore[arg-type]
    assert not alone.equal or not [r for r in alone.results if r.direction == "outputs"]
    strict = tlcore.compare(ordered, transformers_run, steps=[0], modules=layer, sums=[0, 1])
    assert strict.counts["missing"] > 0 and not strict.equal


# Both capture the inside of these layers.
FUSED = [f"model.layers.{layer}.{part}_proj" for layer in (0, 17)
         for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")]  # fmt: skip


def _projections(one: str, other: str) -> Comparison:
    modules = [r"layers\.(0|17)\..*_proj$"]
    return tlcore.compare(
        one, other, steps=[0], modules=modules, by_norm=True, ignore_missing=True, rtol=1e-4, atol=1e-5
    )


def test_vllms_fused_projections_are_compared_with_transformers_part_by_part(
    ordered: str, transformers_run: str
) -> None:
    for found in (_projections(ordered, transformers_run), _projections(transformers_run, ordered)):
        assert found.equal, str(found)
        compared = [each.module for each in found.results if each.direction == "outputs"]
        assert set(FUSED) <= set(compared) and not any("qkv" in each for each in compared)


def test_a_fault_in_one_of_the_fused_projections_is_found_there(ordered: str, tmp_path: Path) -> None:
    fault = "model.layers.17.self_attn.k_proj"
    faulty = _in_transformers(tmp_path, fault)
    for found in (_projections(ordered, faulty), _projections(faulty, ordered)):
        first = found.first_divergence
        assert first is not None and (first.module, first.direction) == (fault, "outputs")
        beside = {each.module for each in found.results if each.agrees and each.direction == "outputs"}
        assert set(FUSED) - beside <= {fault, "model.layers.17.mlp.gate_proj", "model.layers.17.mlp.up_proj"}
