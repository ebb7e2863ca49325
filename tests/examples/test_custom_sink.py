"""The example of a third-party backend: installed as a package, used by name, passing tlcore's suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_sink"
ROOT = EXAMPLE.parents[1]

CAPTURE = """
import sys
import torch, tlcore, tlcore_sqlite
from torch import nn
from tlcore.registry import resolve

assert resolve("sqlite", portable=True).origin == "entry point"
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
x = torch.ones(2, 4)
backend = {"name": "sqlite", "compress": True}
with tlcore.capture(model, output_dir=sys.argv[1], log_step_ids=[], backend=backend) as capture:
    expected = [model(x), model(x + 1)]
assert capture.ledger.balanced and capture.ledger.stored == 8, capture.ledger
found = {name: tensor for _, name, tensor in tlcore_sqlite.read(f"{capture.url}/rank_0.sqlite")}
for step, tensor in enumerate(expected):
    assert torch.equal(found[f"step_{step}/1/outputs_cpu"], tensor)
try:
    tlcore.capture(model, backend={"name": "sqlite", "compres": True})
except tlcore.ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example installed into it; nothing is downloaded."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--disable-pip-version-check", "--target", str(target), str(EXAMPLE)]
    subprocess.run(command, check=True, timeout=120)
    return target


def python(installed: Path, *arguments: str) -> str:
    """What a Python with the example installed prints."""
    paths = (installed, ROOT, ROOT / "backends", ROOT / "schemas")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_model_is_captured_through_it_by_name(installed: Path, tmp_path: Path) -> None:
    assert "$.backend.compres: unknown key. Did you mean" in python(installed, "-c", CAPTURE, str(tmp_path))


@pytest.mark.slow
def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "--import-mode=importlib"]
    assert " passed" in python(installed, "-m", "pytest", *options, str(EXAMPLE / "tests"))
