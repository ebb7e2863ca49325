"""The example of a third-party backend: installed as a package, used by name, passing tlcore's suite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tlcore import ReadError, open_run
from tlcore.reader import list_runs

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_sink"
ROOT = EXAMPLE.parents[1]

CAPTURE = """
import sys
import torch, tlcore
from torch import nn
from tlcore.registry import resolve

assert resolve("sqlite", portable=True).origin == "entry point"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
x = torch.ones(2, 4)
for name, backend in (("sqlite", {"name": "sqlite", "compress": True}), ("pt", "pt")):
    output_dir = f"{sys.argv[1]}/{name}"
    with tlcore.capture(model, output_dir=output_dir, log_step_ids=[], backend=backend) as capture:
        expected = [model(x), model(x + 1)]
    assert capture.ledger.balanced and capture.ledger.stored > 0, capture.ledger
    run = tlcore.open_run(capture.url)
    for step, tensor in enumerate(expected):
        assert torch.equal(run.tensor(f"step_{step}/1/outputs_cpu"), tensor)
    print(capture.url)
try:
    tlcore.capture(model, backend={"name": "sqlite", "compres": True})
except tlcore.ConfigError as error:
    print(error)
"""


COMMANDS = """
import contextlib, io, json, sys
from tlcore.__main__ import main

printed = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(words) == 0, words
    printed.append(out.getvalue())
print(json.dumps(printed))
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


@pytest.fixture(scope="module")
def runs(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run in SQLite, and one of the same steps in ``pt``."""
    out = python(installed, "-c", CAPTURE, str(tmp_path_factory.mktemp("runs")))
    sqlite, pt, refused = out.splitlines()
    assert "$.backend.compres: unknown key. Did you mean" in refused
    return Path(sqlite), Path(pt)


@pytest.mark.slow
def test_what_it_wrote_is_read_by_every_command(
    installed: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    sqlite, pt = runs
    assert {path.name for path in sqlite.iterdir()} == {"run.json", "rank_0.sqlite"}

    there, back, again = (tmp_path / name for name in ("pt", "sqlite", "again"))
    found = iter(
        commands(
            installed,
            ["ls", sqlite.parent],
            ["show", sqlite, "step_1/1/outputs_cpu"],
            ["verify", sqlite],
            ["compare", sqlite, pt],
            ["convert", sqlite, there, "--backend", "pt"],
            ["convert", there / sqlite.name, back, "--backend", "sqlite"],
            ["verify", back / sqlite.name],
            ["convert", back / sqlite.name, again, "--backend", "pt"],
        )
    )
    assert f"{sqlite.name}  complete" in next(found)
    assert "step_1/1/outputs_cpu" in next(found)
    sound = next(found)
    assert "tensors sound" in sound
    assert re.fullmatch(r"the runs agree\ntensors: \d+ bitwise\n", next(found))
    assert next(found).strip() == str(there / sqlite.name)
    assert next(found).strip() == str(back / sqlite.name)
    assert next(found) == sound
    assert contents(again) == contents(there)
    assert (there / sqlite.name / "step_0/0/outputs_cpu.pt").is_file()


def commands(installed: Path, *lines: list[str | Path]) -> list[str]:
    """What each ``tlcore`` command prints, all run by one Python with the example installed."""
    words = json.dumps([[str(word) for word in line] for line in lines])
    return list(json.loads(python(installed, "-c", COMMANDS, words)))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a run, by name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_where_it_is_not_installed_its_runs_are_listed_and_say_why(runs: tuple[Path, Path]) -> None:
    sqlite, _ = runs
    with pytest.raises(ReadError, match="no reader is registered for backend 'sqlite'"):
        _ = open_run(sqlite).steps
    (listed,) = list_runs(sqlite.parent)
    assert (listed.run_id, listed.state) == (sqlite.name, "complete")
    assert "no reader is registered for backend 'sqlite'" in str(listed.problem)
    assert listed.captured > 0


def test_it_is_short() -> None:
    assert len((EXAMPLE / "tlcore_sqlite.py").read_text().splitlines()) < 100


@pytest.mark.slow
def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "--import-mode=importlib"]
    assert " passed" in python(installed, "-m", "pytest", *options, str(EXAMPLE / "tests"))
