"""Every example runs as it stands, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

import tlcore
from tests.models import tiny_llama
from tests.servers import moto

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str, timeout: int = 300) -> str:
    """What an example prints; it must end well."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_plain_module_is_captured_and_read_back(tmp_path: Path) -> None:
    text = run_example(
        "plain_module.py", "--output-dir", str(tmp_path), "--match", r"^layers\.0\.", "--match", "norm"
    )
    assert "captured 16 = stored 16 + skipped 0 + dropped 0 + failed 0" in text
    (run,) = tmp_path.iterdir()
    assert f"run: {run}" in text
    text = run_example("read_run.py", str(run))
    assert f"{run.name} is complete; steps [0, 1]" in text
    assert "16 tensors have the hash that was recorded" in text
    assert "  layers.0.down (call 0): inputs [torch.Size([3, 64])]" in text
    assert "step_0/layers.1.norm/outputs_cpu: torch.float32 (3, 16) mean" in text


@pytest.mark.slow
def test_the_demo_shows_a_real_model(tmp_path: Path) -> None:
    text = run_example("demo.py", "--output-dir", str(tmp_path), timeout=600)
    assert "'The capital of France is' -> ' Paris" in text
    assert "step_0/module_calls.txt" in text
    assert "outputs_0_cpu" in text
    assert "l2" in text
    (run,) = map(tlcore.open_run, tmp_path.iterdir())
    assert (run.state, run.steps) == ("complete", [0])
    assert "model.layers.0" in run.step(0).calls


@pytest.mark.slow
def test_an_autoencoder_learns_from_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_aws_variables: None
) -> None:
    pytest.importorskip("matplotlib")
    with moto(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint_url"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.options["secret"])
        fsspec.filesystem("s3", skip_instance_cache=True, **server.options).mkdir("activations")
        small = ["--prompts", "96", "--layer", "5", "--epochs", "6", "--batch-size", "128"]
        places = ["--output-dir", "s3://activations/runs", "--plot", str(tmp_path / "loss.png")]
        text = run_example("sparse_autoencoder.py", *small, *places, timeout=900)
    assert re.search(r"s3://activations/runs/\S+: [1-9]\d\d tokens of 96 prompts", text)
    first, last = map(float, re.findall(r"unexplained variance: (\S+) at first, (\S+) in the end", text)[0])
    assert last < 0.6 < first
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_probe_on_the_last_token_tells_words_it_has_not_seen(tmp_path: Path) -> None:
    places = ["--output-dir", str(tmp_path), "--layers", "16", "--steps", "200"]
    text = run_example("last_token_probe.py", *places, timeout=600)
    right, count = map(int, re.findall(r"layer 16: (\d+)% of (\d+) prompts", text)[0])
    # A coin is right half of the time.
    assert right >= 85 and count == 144
    (directory,) = tmp_path.iterdir()
    run = tlcore.open_run(directory)
    assert len(run.requests) == 384
    assert {run.tensor(name).shape[0] for name in run.step(0).names if "/outputs" in name} == {32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag"), [("last_token_probe.py", "--layers"), ("sparse_autoencoder.py", "--layer")]
)
def test_an_example_says_which_layers_there_are(script: str, flag: str, tmp_path: Path) -> None:
    if script == "sparse_autoencoder.py":
        pytest.importorskip("matplotlib")
    places = ["--output-dir", str(tmp_path), "--model", str(tiny_llama()), flag, "9"]
    command = [sys.executable, str(EXAMPLES / script), *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and not any(tmp_path.iterdir())
    assert "the model has 4 layers, numbered from 0: name " in done.stderr and flag in done.stderr
