"""The OpenAI-compatible server, configured by a YAML file and ended by SIGTERM."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlcore
from tests.adapters.vllm.server import VllmServer, serving
from tests.models import smollm2
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def served(tmp_path: Path) -> Iterator[VllmServer]:
    """A server that captures into ``tmp_path / "dumps"``."""
    settings = {
        "model": str(smollm2()),
        "enforce-eager": True,
        "max-model-len": 256,
        "intermediate-log-config": {
            "enabled": True,
            "output_dir": str(tmp_path / "dumps"),
            "log_step_ids": [0, 2],
            "module_call_match": [r"layers\.3\.mlp$", "embed_tokens"],
        },
    }
    with serving(tmp_path, settings) as server:
        yield server


def test_a_completion_is_captured_and_sigterm_completes_the_run(served: VllmServer, tmp_path: Path) -> None:
    (directory,) = (tmp_path / "dumps").iterdir()
    assert tlcore.open_run(directory).steps == []

    prompt = {"model": str(smollm2()), "prompt": "Water boils at", "max_tokens": 5, "temperature": 0}
    status, answer = served.ask("/v1/completions", prompt, X_Request_Id="AAA")
    assert status == 200 and len(answer["choices"][0]["text"]) > 0
    wait_until((directory / "step_2" / "step.json").exists, "the steps are stored while the server runs")
    assert tlcore.open_run(directory).state == "incomplete"
    # OpenMP has bound the worker's own thread, and all that vLLM started from it, to the model's processors.
    worker = json.loads((directory / "run.json").read_text())["pid"]
    affinities = [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{worker}/task")]
    assert os.sched_getaffinity(0) in affinities

    served.end()
    run = tlcore.open_run(directory)
    assert run.state == "complete", served.watched.tail()
    assert run.steps == [0, 2]
    assert run.step(0).calls == ["model.embed_tokens", "model.layers.3.mlp"]
    assert run.verify() > 0
    first, later = (row for number in (0, 2) for row in run.step(number).rows or ())
    assert first["external_request_id"] == later["external_request_id"] == "cmpl-AAA-0"
    assert first["request_id"] == later["request_id"] != "cmpl-AAA-0"
    assert (first["first_position"], later["rows"]) == (0, 1)
    assert later["first_position"] == first["rows"] + 1
