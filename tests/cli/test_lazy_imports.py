"""What only lists, checks or moves bytes answers at once: it does not load torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import tlcore

# Runs command after command in one process, and says after which of them torch was there.
_SCRIPT = """
import contextlib, io, json, sys
from tlcore.__main__ import main
loaded, shown = {}, {}
for argv in json.loads(sys.argv[1]):
    before = "torch" in sys.modules
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            status = main(argv)
        except SystemExit as done:
            status = done.code
    shown[" ".join(argv)] = [status, output.getvalue()]
    if "torch" in sys.modules and not before:
        loaded[" ".join(argv)] = True
print(json.dumps([loaded, shown]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of each format, with identical tensors, dtypes of their own and statistics."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Identity()).to(torch.bfloat16)
    urls = {}
    for backend in ("pt", "safetensors"):
        directory = tmp_path_factory.mktemp(backend)
        with tlcore.capture(model, output_dir=str(directory), backend=backend, capture="both") as capture:
            model(torch.ones(2, 4, dtype=torch.bfloat16))
        urls[backend] = capture.url
    return urls


def test_commands_answer_without_torch() -> None:
    commands = [["--help"], ["--version"]]
    commands += [["check-config", '{"backend": "safetensors", "module_call_match": "x:0"}']]
    command = [sys.executable, "-c", _SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded, shown = json.loads(done.stdout)
    assert loaded == {}
    assert {status for status, _ in shown.values()} == {0}


def test_the_package_itself_is_lazy() -> None:
    code = "import sys, tlcore; dir(tlcore); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0
