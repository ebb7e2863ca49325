"""`tlcore explain` on models of several families, each with one operator that computes something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tlcore
from tests.models import write_tokenizer
from tlcore.__main__ import main
from tlcore.adapters.processes import run_module

TOKENS = [[5, 17, 80, 200, 31, 9], [44, 3, 150, 28, 90, 12]]
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
HEADS = {"num_key_value_heads": 2, "head_dim": 32}


class Fault(NamedTuple):
    """A family, what its configuration has otherwise in B, and where that is seen: module, operator, line."""

    family: str
    more: dict[str, Any]
    changed: dict[str, Any]
    module: str
    function: str
    line: str


TRANSFORMERS = {
    "gemma2": Fault(
        "Gemma2", HEADS, {"final_logit_softcapping": 15.0}, "", "torch.Tensor.div", "final_logit_softcapping"
    ),
    "qwen3": Fault(
        "Qwen3", HEADS, {"rms_norm_eps": 0.1}, "model.layers.0.input_layernorm", "torch.Tensor.add",
        "variance_epsilon",
    ),
    "gpt_neox": Fault(
        "GPTNeoX", {}, {"layer_norm_eps": 0.1}, "gpt_neox.layers.0.input_layernorm",
        "torch.nn.functional.layer_norm", "F.layer_norm(",
    ),
    "qwen2": Fault(
        "Qwen2", {"num_key_value_heads": 2}, {"hidden_act": "gelu"}, "model.layers.0.mlp.act_fn", "gelu",
        "self.act(input)",
    ),
}  # fmt: skip


def _checkpoints(fault: Fault, directory: Path) -> list[Path]:
    """A random model of the family, and the same weights with the other configuration."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{fault.family}Config")(**SIZES, **fault.more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{fault.family}ForCausalLM")(config)
    found = []
    for name, changed in (("right", {}), ("wrong", fault.changed)):
        model.save_pretrained(directory / name)
        write_tokenizer(directory / name)
        file = directory / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
        found.append(directory / name)
    return found


def _captured(model: Path, directory: Path) -> str:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    ids = torch.tensor(TOKENS)
    with torch.no_grad(), tlcore.capture(loaded, output_dir=str(directory / "runs")) as capture:
        loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return str(capture.url)


def _check(fault: Fault, urls: list[str], paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["explain", *urls, "--model", str(paths[0]), "--model-b", str(paths[1]), "--format", "json"]
    assert main(asked) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["module"] == fault.module, found["verdict"]
    operator = found["divergence"]["operator"]["b"]
    assert fault.function in operator["function"], found["verdict"]
    line = Path(operator["file"]).read_text().splitlines()[operator["line"] - 1]
    assert fault.line in line, (operator, line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [each if each == "gpt_neox" else pytest.param(each, marks=pytest.mark.deep) for each in TRANSFORMERS],
)
def test_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = TRANSFORMERS[name]
    paths = _checkpoints(fault, tmp_path)
    _check(fault, [_captured(each, tmp_path) for each in paths], paths, capsys)


VLLM = {
    "gemma2": TRANSFORMERS["gemma2"]._replace(module="logits_processor", line="logits / self.soft_cap"),
    "qwen3": TRANSFORMERS["qwen3"]._replace(line="+ epsilon"),
    "qwen2": TRANSFORMERS["qwen3"]._replace(
        family="Qwen2", more={"num_key_value_heads": 2}, line="+ epsilon"
    ),
}


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize("name", VLLM)
def test_vllm(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = VLLM[name]
    paths, urls = _checkpoints(fault, tmp_path), []
    for path in paths:
        config = {"output_dir": str(tmp_path / "runs"), "log_step_ids": [0]}
        settings = {
            "model": str(path),
            "dtype": "float32",
            "arguments": {},
            "prompts": TOKENS,
            "config": config,
        }
        place, environment = tmp_path / f"{path.name}-again", {"VLLM_CPU_KVCACHE_SPACE": "1"}
        urls.append(run_module("tlcore.adapters.vllm.again", settings, place, 600, environment)["url"])
    _check(fault, urls, paths, capsys)
