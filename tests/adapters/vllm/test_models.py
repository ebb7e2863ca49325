"""Kinds of models: a mixture of experts and an embedding model, eager and compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report
from tests.adapters.vllm.models_script import TOKENS
from tests.adapters.vllm.truth import Truth
from tests.models import minilm, tiny_llama, tiny_moe

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "models_script.py")


def _asked(model: Path, task: str, mode: str, output_dir: Path) -> tuple[dict[str, Any], tlcore.Run]:
    # vLLM's setting for tests: traced as ever, but not compiled to machine code.
    made = report(SCRIPT, str(model), task, mode, str(output_dir), environment={"VLLM_CPU_CI_ENV": "1"})
    run = tlcore.open_run(made["url"])
    assert run.state == "complete"
    assert all_stored(run.ledger)
    assert run.verify() > 0
    return made, run


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_mixture_of_experts(mode: str, tmp_path: Path) -> None:
    made, run = _asked(tiny_moe(), "generate", mode, tmp_path)
    assert made["after"] == made["plain"]
    if mode == "eager":
        assert made["captured"] == made["plain"]
    assert run.steps == list(range(TOKENS))
    for layer in ("model.layers.0", "model.layers.1"):
        moe = f"{layer}.block_sparse_moe"
        assert {layer, moe, f"{moe}.gate", f"{moe}.experts"} <= set(run.step(0).calls)
        scores = run.tensor(f"step_0/{moe}.gate/outputs_0_cpu")
        rows = run.tensor("step_0/model.embed_tokens/inputs_0_cpu").shape[0]
        assert scores.shape == (rows, 4)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_an_embedding_model(mode: str, tmp_path: Path) -> None:
    made, run = _asked(minilm(), "embed", mode, tmp_path)
    assert made["after"] == made["plain"]
    if mode == "eager":
        assert made["captured"] == made["plain"]
    torch.testing.assert_close(torch.tensor(made["captured"]), torch.tensor(made["plain"]), rtol=0, atol=5e-3)
    assert len(run.ledger.reasons) == 0
    calls = run.step(0).calls
    assert any(call.endswith("encoder.layer.5") for call in calls) and any("pooler" in call for call in calls)
    # The embedding is the normalized mean over a prompt's rows of the last layer.
    (step,) = (run.step(number) for number in run.steps)
    last = next(call for call in calls if call.endswith("encoder.layer.5"))
    hidden = run.tensor(f"step_0/{last}/outputs_cpu").float()
    assert step.rows is not None
    for row, embedding in zip(step.rows, made["captured"], strict=True):
        mean = hidden[row["first_row"] :][: row["rows"]].mean(0)
        similarity = torch.cosine_similarity(mean, torch.tensor(embedding), dim=0)
        assert float(similarity) > 0.999


@pytest.mark.deep
def test_a_mixture_of_experts_that_transformers_runs(tmp_path: Path) -> None:
    """Its layers have a sample's rows, and the experts in them the tokens alone."""
    made, run = _asked(tiny_moe(), "generate", "transformers", tmp_path)
    assert made["captured"] == made["after"] == made["plain"]
    truth = Truth(tiny_moe())
    for request, answer in zip(map(run.request, run.requests), made["captured"], strict=True):
        tokens = request.token_ids.tolist()
        states, _ = truth.of(tokens)
        positions = list(range(len(tokens)))
        assert tokens[request.prompt_length :] == answer[:-1]
        assert request.positions("model.layers.0/outputs_cpu") == positions
        torch.testing.assert_close(request["model.layers.0/outputs_cpu"], states[1], atol=2e-4, rtol=2e-3)
        for name in ("gate/outputs_0_cpu", "experts/inputs_0_cpu", "experts/outputs_cpu"):
            assert request.positions(f"model.layers.0.mlp.{name}") == positions
        block = request["model.layers.0.mlp/outputs_cpu"]
        assert torch.equal(request["model.layers.0.mlp.experts/outputs_cpu"], block)


@pytest.mark.deep
def test_an_embedding_model_that_transformers_runs(tmp_path: Path) -> None:
    made, run = _asked(minilm(), "embed", "transformers", tmp_path)
    assert made["captured"] == made["after"] == made["plain"]
    for request, embedding in zip(map(run.request, run.requests), made["captured"], strict=True):
        mean = request["model.encoder.layer.5/outputs_cpu"].mean(0)
        assert float(torch.cosine_similarity(mean, torch.tensor(embedding), dim=0)) > 0.99999
        # Of the batch as one sample, and nobody's.
        assert not any(name.startswith("model.pooler/outputs") for name in request)


@pytest.mark.deep
def test_two_labels_of_two_requests_are_no_rows_of_both(tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_llama(), num_labels=2, pad_token_id=1)
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / name, tmp_path / "model" / name)
    made, run = _asked(tmp_path / "model", "classify", "eager", tmp_path / "dumps")
    assert made["captured"] == made["plain"] and [len(scores) for scores in made["plain"]] == [2, 2]
    step = run.step(0)
    scores = [step[name] for name in step if name.startswith("step_0/pooler/outputs")]
    assert [each.shape for each in scores] == [(2,), (2,)]
    assert len(run.requests) == 2
    for request in map(run.request, run.requests):
        assert "model.norm/outputs_0_cpu" in request
        assert not any(name.startswith("pooler/outputs") for name in request)
