"""An in-process engine, with capture of everything and without: same tokens, and the right tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.engine_script import TOKENS
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report
from tests.models import smollm2

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "engine_script.py")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The engine with tlcore installed and nothing asked of it."""
    return report(SCRIPT, str(smollm2()), json.dumps(None))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in_process") / "dumps"


@pytest.fixture(scope="module")
def captured(output_dir: Path) -> dict[str, Any]:
    """The engine with every module of every step captured, and the operators of a layer."""
    config = {"output_dir": str(output_dir), "log_step_ids": [], "ops": [r"layers\.5\."]}
    return report(SCRIPT, str(smollm2()), json.dumps(config))


@pytest.fixture(scope="module")
def recorded(captured: dict[str, Any], output_dir: Path) -> Any:
    (directory,) = output_dir.iterdir()
    return tlcore.open_run(directory)


def test_capture_of_everything_leaves_greedy_tokens_alone(
    plain: dict[str, Any], captured: dict[str, Any]
) -> None:
    assert captured["prompts"] == plain["prompts"]
    assert captured["tokens"] == plain["tokens"]
    assert [len(tokens) for tokens in captured["tokens"]] == [TOKENS] * 8


def test_without_configuration_there_is_no_trace(plain: dict[str, Any]) -> None:
    assert plain["hooks"] == 0
    assert not [name for name in plain["threads"] if "tlcore" in name]


def test_the_compilable_module_is_left_as_it_is(plain: dict[str, Any], captured: dict[str, Any]) -> None:
    assert captured["decoder"] == plain["decoder"]


def test_a_forgotten_engine_completes_its_run(captured: dict[str, Any], recorded: Any) -> None:
    assert captured["states"] == ["complete"]
    assert recorded.state == "complete"
    assert recorded.steps == list(range(TOKENS))
    ledger = recorded.ledger
    assert all_stored(ledger) and ledger.stored > 1000 * TOKENS
    assert recorded.verify() > 0


def test_the_compilable_module_is_captured(recorded: Any) -> None:
    step = recorded.step(0)
    assert step.calls[:2] == ["_root", "model"]
    assert "step_0/model/inputs_0_cpu" in step.names
    output = recorded.tensor("step_0/model/outputs_cpu")
    assert torch.equal(output, recorded.tensor("step_0/model.norm/outputs_0_cpu"))


def test_rows_say_which_tokens_belong_to_which_request(captured: dict[str, Any], recorded: Any) -> None:
    fed = [prompt + tokens for prompt, tokens in zip(captured["prompts"], captured["tokens"], strict=True)]
    for number in recorded.steps:
        ids = recorded.tensor(f"step_{number}/model.embed_tokens/inputs_0_cpu").tolist()
        rows = recorded.step(number).rows
        assert [row["external_request_id"] for row in rows] == [str(i) for i in range(8)]
        assert sum(row["rows"] for row in rows) == len(ids)
        for i, row in enumerate(rows):
            assert row["request_id"].startswith(f"{i}-")
            first, start, count = row["first_row"], row["first_position"], row["rows"]
            assert start == (0 if number == 0 else len(captured["prompts"][i]) + number - 1)
            assert ids[first : first + count] == fed[i][start : start + count]


def test_layer_0_agrees_with_transformers(captured: dict[str, Any], recorded: Any) -> None:
    from transformers import AutoModelForCausalLM

    hidden = recorded.tensor("step_0/model.layers.0/outputs_0_cpu").float()
    residual = recorded.tensor("step_0/model.layers.0/outputs_1_cpu").float()
    ours = hidden + residual
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append((output if torch.is_tensor(output) else output[0]).detach())
    )
    for row, prompt in zip(recorded.step(0).rows, captured["prompts"], strict=True):
        with torch.no_grad():
            model(torch.tensor([prompt]))
        theirs = seen.pop().float().reshape(len(prompt), -1)
        first = row["first_row"]
        mine = ours[first : first + row["rows"]]
        # Both sides round to bfloat16 (relative 2**-9) a dozen times within the layer.
        assert bool(((mine - theirs).norm(dim=1) < 2**-6 * theirs.norm(dim=1)).all())
        assert float((mine - theirs).norm()) < 2**-7 * float(theirs.norm())


def test_the_operators_of_a_layer_are_captured(recorded: Any) -> None:
    for number in (0, TOKENS - 1):
        step = recorded.step(number)
        (split,) = step.call("model.layers.5.self_attn").operators
        assert split.name == "split" and split.file.endswith("models/llama.py")
        query, key, value = step.call("model.layers.5.self_attn").result_of(split)
        ours = step.call("model.layers.5.self_attn.qkv_proj")
        assert torch.equal(torch.cat([query, key, value], -1), ours.outputs[0])
        attention = step.call("model.layers.5.self_attn.attn")
        (used,) = [each for each in attention.operators if "unified_attention" in each.name]
        assert not used.file.endswith("_ops.py")
        assert torch.equal(attention.result_of(attention.operators[-1]), attention.outputs)
        weights = [
            each["parameter"]
            for used in step.call("model.layers.5.input_layernorm").operators
            for each in used.operands()
            if "parameter" in each
        ]
        assert weights == ["model.layers.5.input_layernorm.weight"]
    assert not any("/op." in name for name in recorded.step(0).names if ".layers.5." not in name)
