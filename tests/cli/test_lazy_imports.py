"""What only lists, checks or moves bytes answers at once: it does not load torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore import cli

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
    backends = {"pt": "pt", "segments": "safetensors", "shards": {"name": "safetensors", "layout": 1}}
    for name, backend in backends.items():
        directory = tmp_path_factory.mktemp(name)
        with tlcore.capture(model, output_dir=str(directory), backend=backend, capture="both") as capture:
            model(torch.ones(2, 4, dtype=torch.bfloat16))
        urls[name] = capture.url
    return urls


def test_commands_answer_without_torch(runs: dict[str, str], tmp_path: Path) -> None:
    commands = [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
    commands += [["check-config", '{"backend": "safetensors", "module_call_match": "x:0"}']]
    commands += [["push", str(tmp_path)]]
    for url in runs.values():
        commands += [["ls", str(Path(url).parent)], ["ls", url], ["ls", url, "--step", "0", "--json"]]
        commands += [["verify", url], ["verify", url, "--json"]]
        commands += [["prune", str(Path(url).parent), "--older-than", "0s", "--dry-run"]]
    command = [sys.executable, "-c", _SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded, shown = json.loads(done.stdout)
    assert loaded == {}
    assert {status for status, _ in shown.values()} == {0}
    for url in runs.values():
        assert "tensors sound" in shown[f"verify {url}"][1]
        assert "bfloat16" in shown[f"ls {url} --step 0 --json"][1]
        assert Path(url).name in shown[f"prune {Path(url).parent} --older-than 0s --dry-run"][1]


def test_the_package_itself_is_lazy() -> None:
    code = "import sys, tlcore; dir(tlcore); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=300, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_capture_loads_nothing_that_reads(tmp_path: Path, backend: str) -> None:
    code = """
import sys, torch, tlcore
model = torch.nn.Linear(2, 2)
with tlcore.capture(model, output_dir=sys.argv[1], backend=sys.argv[2]) as capture:
    model(torch.ones(1, 2))
assert capture.ledger.stored == 2
ours = [name for name in sys.modules if name.startswith(("tlcore.", "tlcore_backends."))]
print([name for name in ours if name.startswith("tlcore.reader") or name.endswith("source")])
"""
    command = [sys.executable, "-c", code, str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
