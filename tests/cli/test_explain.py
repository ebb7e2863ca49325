"""`tlcore explain`, on checkpoints that engines in processes of their own run again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.models import tiny_llama
from tlcore.__main__ import main
from tlcore.adapters.processes import run_module

TOKENS = [[5, 17, 80, 200, 31, 9], [44, 3, 150, 28, 90, 12]]


def other_checkpoint(directory: Path, **config: Any) -> Path:
    """The tiny model's checkpoint, configured otherwise."""
    shutil.copytree(tiny_llama(), directory)
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, **config}))
    return directory


def captured(
    model: Path, directory: Path, change: Callable[[Any], None] = lambda model: None, **config: Any
) -> str:
    """The URL of a run of two prompts in one batch."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    change(loaded)
    ids = torch.tensor(TOKENS)
    with torch.no_grad(), tlcore.capture(loaded, output_dir=str(directory / "runs"), **config) as capture:
        loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return capture.url


def explained(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = main(["explain", *args, "--format", "json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, document


@pytest.mark.slow
def test_the_operator_and_its_line_are_named_of_runs_without_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_checkpoint(tmp_path / "other", rms_norm_eps=0.1)
    a, b = captured(tiny_llama(), tmp_path), captured(other, tmp_path)
    kept = tmp_path / "kept"
    status, found = explained(
        capsys, a, b, "--model", str(tiny_llama()), "--model-b", str(other), "--keep", str(kept)
    )
    assert status == 1
    assert (found["first_divergence"]["module"], found["first_divergence"]["born"]) == (
        "model.layers.0.input_layernorm",
        True,
    )
    assert len(found["again"]) == 1 and all(url.startswith(str(kept)) for url in found["again"][0])
    operator = found["divergence"]["operator"]["b"]
    assert found["divergence"]["born"] is True
    assert operator["function"] == "torch.Tensor.add", found["verdict"]
    assert operator["file"].endswith("modeling_llama.py")
    line = Path(operator["file"]).read_text().splitlines()[operator["line"] - 1]
    assert "self.variance_epsilon" in line
    # The request's own tokens, and no others.
    run = tlcore.open_run(found["again"][0][0])
    assert run.request(next(iter(run.requests))).token_ids.tolist() in TOKENS


@pytest.mark.slow
def test_where_few_modules_were_captured_all_are_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    other = other_checkpoint(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"module_call_match": [r"layers\.\d+$"]}
    a, b = captured(tiny_llama(), tmp_path, **config), captured(other, tmp_path, **config)
    status, found = explained(capsys, a, b, "--model", str(tiny_llama()), "--model-b", str(other))
    assert status == 1 and found["first_divergence"]["module"] == "model.layers.2"
    assert len(found["again"]) == 1
    last = found["divergence"]
    assert last["module"] == "model.layers.2.mlp.down_proj", found["verdict"]
    assert last["operator"]["a"]["function"] == "torch.nn.functional.linear"


@pytest.mark.slow
def test_what_does_not_happen_again_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)

    a, b = captured(tiny_llama(), tmp_path), captured(tiny_llama(), tmp_path, change)
    status, found = explained(capsys, a, b, "--model", str(tiny_llama()))
    assert status == 1 and found["divergence"] is None
    assert "they agree. They part in something that this pass lacks" in found["verdict"]
    assert f"transformers with {tiny_llama()}" in found["verdict"] and " 6 tokens" in found["verdict"]


@pytest.mark.slow
def test_two_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = other_checkpoint(tmp_path / "other", rms_norm_eps=0.1)
    settings = {
        "model": str(tiny_llama()),
        "dtype": "float32",
        "arguments": {},
        "prompts": TOKENS,
        "config": {"output_dir": str(tmp_path / "runs"), "log_step_ids": [0]},
    }
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    a = run_module("tlcore.adapters.vllm.again", settings, tmp_path / "a", 600, environment)["url"]
    b = captured(other, tmp_path)
    options = ("--sum", "hidden,residual", "--ignore-missing", "--keep", str(tmp_path / "kept"))
    status, found = explained(capsys, a, b, "--model", str(tiny_llama()), "--model-b", str(other), *options)
    assert status == 1
    assert found["first_divergence"]["module"] == "model.layers.0.input_layernorm"
    (urls,) = found["again"]
    models = [tlcore.open_run(url).document["environment"]["model"].partition(".")[0] for url in urls]
    assert models == ["vllm", "transformers"]
    assert found["divergence"]["module"] == "model.layers.0.input_layernorm"


def _with_own_code(directory: Path, old: str, new: str) -> Path:
    """A tiny T5 whose checkpoint brings the code of transformers', changed in one place."""
    import transformers
    from transformers.models.t5 import modeling_t5

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "d_model": 16, "d_ff": 24, "num_heads": 2, "d_kv": 8, "vocab_size": 60}
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0)
    ).save_pretrained(directory)
    text = Path(str(modeling_t5.__file__)).read_text()
    assert old in text
    text = re.sub(r"from \.\.\.(\w+)", r"from transformers.\1", text.replace(old, new))
    text = text.replace("from ... import", "from transformers import")
    text = text.replace("from .configuration_t5", "from transformers.models.t5.configuration_t5")
    (directory / f"{directory.name}_code.py").write_text(text)
    document = json.loads((directory / "config.json").read_text())
    document["auto_map"] = {"AutoModelForSeq2SeqLM": f"{directory.name}_code.T5ForConditionalGeneration"}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


@pytest.mark.slow
def test_a_line_in_a_checkpoints_own_code_of_encoder_and_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    scores = "attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling\n"
    wrong = scores.replace("\n", " * 1.5\n")
    arguments = {"trust_remote_code": True, "attn_implementation": "eager"}
    paths = _with_own_code(tmp_path / "right", "", ""), _with_own_code(tmp_path / "wrong", scores, wrong)
    urls = []
    for path in paths:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, **arguments).eval()
        with torch.no_grad(), tlcore.capture(model, output_dir=str(tmp_path / "runs")) as capture:
            model(input_ids=torch.tensor(TOKENS) % 60, decoder_input_ids=torch.tensor([[0, 4], [0, 9]]))
        urls.append(str(capture.url))
    status, found = explained(
        capsys, *urls, "--model", str(paths[0]), "--model-b", str(paths[1]),
        "--engine-args", json.dumps(arguments),
    )  # fmt: skip
    assert status == 1 and found["divergence"]["module"] == "encoder.block.0.layer.0.SelfAttention"
    operator = found["divergence"]["operator"]
    assert (
        operator["other_code"] and operator["a"] is None and operator["b"]["function"] == "torch.Tensor.mul"
    )
    line = Path(operator["b"]["file"]).read_text().splitlines()[operator["b"]["line"] - 1]
    assert line.strip() == wrong.strip()


def test_runs_that_agree_need_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = captured(tiny_llama(), tmp_path, module_call_match=["norm$"])
    assert main(["explain", a, a, "--model", "nothing-that-is-loaded"]) == 0
    assert "explained: no value of A and B differs: there is nothing to explain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"log_token_ids": False}, (), "what the runs were given is not known, so they cannot be made again"),
        ({}, ("--engine", "sglang"), "'sglang' is not one of transformers, vllm"),
        ({}, ("--engine-args", "[1]"), "'[1]' is no JSON object"),
        ({}, ("--engine-args-b", "{"), "is no JSON"),
    ],
    ids=["no-tokens", "engine", "array", "text"],
)
def test_what_cannot_be_made_again_is_said(
    config: dict[str, Any],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(model: Any) -> None:
        model.model.norm.weight.data += 1

    config = {"module_call_match": ["norm$"], **config}
    a, b = captured(tiny_llama(), tmp_path, **config), captured(tiny_llama(), tmp_path, change, **config)
    assert main(["explain", a, b, "--model", str(tiny_llama()), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_no_engine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = []
    for bias in (0.0, 1.0):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.constant_(model.bias, bias)
        with tlcore.capture(model, output_dir=str(tmp_path)) as capture:
            model(torch.ones(1, 2))
        urls.append(capture.url)
    assert main(["explain", *urls, "--model", str(tiny_llama())]) == 2
    error = capsys.readouterr().err
    assert "--engine" in error and "of torch.nn.modules.linear.Linear" in error
