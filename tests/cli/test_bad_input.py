"""Bad input to any command: status 2 and one message that says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main

NO_NUMBERS = "'x' is no list of whole numbers, such as 0,1"

# A command line, and what its message must say. A and B are runs, DUMPS holds both, EMPTY nothing.
CASES = {
    "compare A B --steps x": NO_NUMBERS,
    "stats A --steps x": NO_NUMBERS,
    "compare A B --sum hiden,residual": "give the names hidden,residual or output positions such as 0,1",
    "compare A B --sum hidden": "sums: (0,) is not a sequence of output positions to add, such as (0, 1)",
    "compare A B --rtol -1": "rtol: -1.0 is not a tolerance, which is a number >= 0",
    "compare A B --atol nan": "atol: nan is not a tolerance, which is a number >= 0",
    "compare A B --request X=Y": "requests: there are none to pair: not both runs know the rows of requests",
    "compare A B --steps 7,9": "neither run has step 7, 9; A has 0, 1, B has 0, 1",
    "compare A B --modules nothing": "no tensor to compare in the modules asked for",
    "stats A --modules nothing": "no tensor to look at in the modules asked for; its whole steps are 0, 1",
    "stats A --steps 7": "no tensor to look at; its whole steps are 0, 1",
    "show A step_0": "'step_0' is a whole step; `tlcore ls ",
    "show A step_0/step.json": "not the structure of a call, such as .../inputs.json",
    "show DUMPS step_0": "none itself; give one of them; the newest is NEWEST before it:",
    "ls A/step_0": "/step_0: lies in the run dumps/",
    "verify A/step_0": "it lies in the run RUN: give that",
    "ls torn.pt": "torn.pt: not a .pt file that can be read (not a zip archive",
    "ls old.pkl": "old.pkl: a pickle is not read; save tensors by torch.save",
    "ls FILE": "file: is a file; give the run's directory, or a dump of another tool",
    "prune A --older-than 0s": "is a run itself, and prune removes runs; give the output_dir that it lies in",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad_input")
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for _ in range(2):
        with tlcore.capture(model, output_dir=str(directory / "dumps"), log_step_ids=[]):
            model(torch.ones(1, 2))
            model(torch.ones(1, 2))
    (directory / "empty").mkdir()
    for name in ("file", "torn.pt", "old.pkl"):
        (directory / name).write_text("x")
    return directory


@pytest.mark.parametrize("line", CASES)
def test_the_message_says_what_to_do(
    line: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    a, b = (f"dumps/{name}" for name in sorted(os.listdir("dumps")))
    names = {"A": a, "B": b, "DUMPS": "dumps", "EMPTY": "empty", "FILE": "file"}
    words = [names.get(word, word.replace("A/", f"{a}/")) for word in shlex.split(line)]
    try:
        status = main(words)
    except SystemExit as done:
        status = int(done.code or 0)
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert CASES[line].replace("NEWEST", b).replace("RUN", os.path.abspath(a)) in shown.err
