"""Runs in segments whose process is killed: what an index commits is whole, the rest means nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import tlcore


def test_a_killed_process_loses_what_no_index_commits(tmp_path: Path) -> None:
    script = (
        "import os, sys, time, torch, tlcore\n"
        "module = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "backend = {'name': 'safetensors', 'commit_s': 0.3}\n"
        "with tlcore.capture(module, output_dir=sys.argv[1], backend=backend, log_step_ids=[]) as captured:\n"
        "    for step in range(10_000):\n"
        "        module(torch.full((2, 4), float(step)))\n"
        "        time.sleep(0.01)\n"
        "        if captured.ledger.stored >= 20:\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120).returncode == -9
    (path,) = tmp_path.iterdir()
    run = tlcore.open_run(path)
    assert run.state == "incomplete" and len(run.steps) >= 10
    assert run.steps == list(range(len(run.steps)))
    assert run.verify() == run.ledger.stored >= 20
    for step in run.steps:
        assert torch.equal(run.tensor(f"step_{step}/0/inputs_0"), torch.full((2, 4), float(step)))
