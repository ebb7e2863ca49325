"""The documented commands of the example, as they stand, in vLLM's usual spawned processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tlcore
from tests.adapters.vllm.helpers import all_stored, run, run_script
from tests.models import tiny_llama

pytestmark = pytest.mark.slow
Start = Callable[..., subprocess.CompletedProcess[str]]
EXAMPLE = "./examples/offline_inference/llm_engine_example.py"


def _example(start: Start, **config: object) -> str:
    flags = ("--model", str(tiny_llama()), "--enforce-eager", "--intermediate-log-config", json.dumps(config))
    done = start(EXAMPLE, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "request-0: 'The capital of France is' ->" in done.stdout
    return done.stdout + done.stderr


def _in_one_process(*command: str) -> subprocess.CompletedProcess[str]:
    return run_script(*command, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def test_two_runs_lie_side_by_side(tmp_path: Path) -> None:
    output = _example(run, enabled=True, output_dir=str(tmp_path))
    (first,) = tmp_path.iterdir()
    assert str(first) in output
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    # Nothing but its run is told of the second one.
    _example(_in_one_process, enabled=True, output_dir=str(tmp_path), module_call_match=r"layers\.0\.")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before

    everything, layer = sorted(map(tlcore.open_run, tmp_path.iterdir()), key=lambda each: each.created)
    assert (everything.id, everything.state, layer.state) == (first.name, "complete", "complete")
    assert everything.steps == layer.steps == [0]
    calls = everything.step(0).calls
    assert {"model", "model.embed_tokens", "model.layers.3.mlp", "logits_processor"} <= set(calls)
    assert layer.step(0).calls == [each for each in calls if "layers.0." in each]
    assert all_stored(everything.ledger) and everything.ledger.stored > 100
    assert (everything.step(0).rows or [{}])[0]["external_request_id"] == "request-0"
