"""`tlcore explain` and `tlcore replay` of a model with an adapter of peft, out of the adapter's directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tlcore.__main__ import main

pytestmark = pytest.mark.slow
PROJECTION = "base_model.model.model.layers.1.mlp.up_proj"


def _adapted(directory: Path, alpha: int) -> Any:
    """A random Llama whose checkpoint lies in ``base``, with the same adapter at another scale."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = directory / "base"
    if not base.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(base)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(directory / f"adapter_{alpha}")
    return model


def _captured(model: Any, directory: Path) -> str:
    ids = torch.tensor([[5, 17, 30, 20, 31, 9]])
    with torch.no_grad(), tlcore.capture(model, output_dir=str(directory / "runs")) as capture:
        model(input_ids=ids, use_cache=False)
    return str(capture.url)


@pytest.mark.deep
def test_the_line_in_which_adapters_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = [_captured(_adapted(tmp_path, alpha), tmp_path) for alpha in (8, 16)]
    models = ["--model", str(tmp_path / "adapter_8"), "--model-b", str(tmp_path / "adapter_16")]
    assert main(["explain", *urls, *models, "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    operator = found["divergence"]["operator"]["b"]
    assert found["divergence"]["module"] == PROJECTION.replace("layers.1", "layers.0"), found["verdict"]
    line = Path(operator["file"]).read_text().splitlines()[operator["line"] - 1]
    assert "scaling" in line and "lora" in operator["file"]


def test_a_call_is_replayed_with_its_adapter_and_shown_by_a_script_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = _captured(_adapted(tmp_path, 8), tmp_path)
    _adapted(tmp_path, 16)
    call = f"step_0/{PROJECTION}"
    assert main(["replay", url, call, "--model", str(tmp_path / "adapter_8")]) == 0
    assert "equal to what was captured, in every bit" in capsys.readouterr().out
    script = tmp_path / "shows.py"
    wrong = ["replay", url, call, "--model", str(tmp_path / "adapter_16"), "--minimise", str(script)]
    assert main(wrong) == 1
    code = f"import runpy, sys; sys.modules['tlcore'] = None; runpy.run_path({str(script)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert run.returncode == 1 and "outputs: (1, 1, 64), off by" in run.stdout, run.stderr
    told = tmp_path / "adapter_8" / "adapter_config.json"
    config = json.loads(told.read_text())
    for base, said in (("somebody/else", "which is no directory"), (None, "no base_model_name_or_path")):
        told.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert main(["replay", url, call, "--model", str(tmp_path / "adapter_8")]) == 2
        assert said in capsys.readouterr().err
