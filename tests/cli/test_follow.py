"""`tlcore ls --follow`: a running capture's steps as they are committed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.waiting import join, wait_until
from tlcore.__main__ import main
from tlcore.cli import ls


@pytest.mark.parametrize("backend", ["pt", {"name": "safetensors", "commit_s": 0.05}])
def test_steps_are_told_as_they_are_committed(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ls, "_PAUSE_S", 0.02)
    model = nn.Sequential(nn.Linear(4, 4))
    told: list[str] = []

    def heard() -> list[str]:
        told.extend(capsys.readouterr().out.splitlines())
        return told

    status: list[int] = []
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, log_step_ids=[]) as running:
        model(torch.ones(2, 4))
        running.session.flush()
        following = threading.Thread(
            target=lambda: status.append(main(["ls", running.url, "--follow", "--json"]))
        )
        following.start()
        wait_until(lambda: len(heard()) == 1, "the first step is told")
        model(torch.ones(2, 4))
        model(torch.ones(2, 4))
        running.session.flush()
        wait_until(lambda: len(heard()) == 3, "all steps are told while the capture runs")
        assert following.is_alive()
    join(following)
    *steps, last = (json.loads(line) for line in heard())
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert (last["state"], last["ledger"]["stored"]) == ("complete", running.ledger.stored)
    assert status == [0]


def test_a_run_whose_process_has_died_is_not_followed_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import os, sys, torch, tlcore\n"
        "module = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "captured = tlcore.capture(module, output_dir=sys.argv[1], backend='safetensors', log_step_ids=[])\n"
        "captured.__enter__()\n"
        "module(torch.ones(2, 4))\n"
        "captured.session.flush()\n"
        "os._exit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120).returncode == 1
    (run,) = tmp_path.iterdir()
    assert main(["ls", str(run), "--follow"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 0  2 calls  4 tensors") and "the process that wrote it has ended" in last


def test_what_cannot_be_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path), "--follow"]) == 2
    assert main(["ls", str(tmp_path), "--follow", "--step", "0"]) == 2
    assert "leave out --step and --module" in capsys.readouterr().err
