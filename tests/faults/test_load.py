"""An hour's worth of steps in a few minutes: nothing grows, nothing is lost, nothing is counted wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.deep import scaled
from tests.faults.helpers import Usage
from tests.faults.processes import ROOT
from tlcore.reader import list_runs

pytestmark = pytest.mark.slow

STEPS = {"safetensors": scaled(2000, 20_000), "pt": scaled(600, 6000)}
STEP_TENSORS = 6
MEGABYTE = 1 << 20


def start(output_dir: Path, format: str, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.load", str(output_dir), format, str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=scaled(120, 1800))
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(output)
    return report


def assert_ledger_is_exact(report: dict[str, Any], steps: int) -> tlcore.Run:
    assert report["same"]
    ledger = report["ledger"]
    assert ledger["stored"] == ledger["captured"] == steps * STEP_TENSORS
    run = tlcore.open_run(report["url"])
    assert run.steps == list(range(steps))
    assert run.ledger.to_json() == ledger
    assert run.verify() == steps * STEP_TENSORS
    assert sum(run.step(number).ledger.stored for number in run.steps) == ledger["stored"]
    return run


@pytest.mark.parametrize("format", STEPS)
def test_many_steps_leave_memory_handles_and_threads_as_they_were(format: str, tmp_path: Path) -> None:
    report = report_of(start(tmp_path, format, STEPS[format]))
    assert_ledger_is_exact(report, STEPS[format])
    samples = [Usage(*sample) for sample in report["samples"]]
    # The first fifth warms up: chunks, allocator, imports.
    settled = samples[4:]
    assert {(sample.handles, sample.threads) for sample in settled} == {settled[0][1:]}
    assert settled[-1].memory - settled[0].memory < 4 * MEGABYTE


def test_two_processes_share_an_output_dir(tmp_path: Path) -> None:
    steps = scaled(200, 5000)
    both = [start(tmp_path, format, steps) for format in ("pt", "safetensors")]
    runs = [assert_ledger_is_exact(report_of(process), steps) for process in both]
    assert {run.id for run in runs} == {summary.run_id for summary in list_runs(tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == {run.id for run in runs}
