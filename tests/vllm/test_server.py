"""The OpenAI-compatible server, configured by a YAML file and ended by SIGTERM."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.models import smollm2
from tests.vllm.helpers import ENVIRONMENT, REPOSITORY

pytestmark = pytest.mark.slow
START_SECONDS = 180
STOP_SECONDS = 60


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "X-Request-Id": "AAA"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """A server's URL, its process and its log; it captures into ``tmp_path / "dumps"``."""
    port = _free_port()
    settings = {
        "model": str(smollm2()),
        "host": "127.0.0.1",
        "port": port,
        "enforce-eager": True,
        "max-model-len": 256,
        "intermediate-log-config": {
            "enabled": True,
            "output_dir": str(tmp_path / "dumps"),
            "log_step_ids": [0, 2],
            "module_call_match": [r"layers\.3\.mlp$", "embed_tokens"],
        },
    }
    # JSON is YAML.
    (tmp_path / "server.yaml").write_text(json.dumps(settings))
    log = tmp_path / "server.log"
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--config")
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, str(tmp_path / "server.yaml")],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, server, log)
            yield url, server, log
        finally:
            server.kill()
            server.wait()


def test_a_completion_is_captured_and_sigterm_completes_the_run(
    served: tuple[str, subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    url, server, log = served
    (directory,) = (tmp_path / "dumps").iterdir()
    assert tlcore.open_run(directory).steps == []

    prompt = {"model": str(smollm2()), "prompt": "Water boils at", "max_tokens": 5, "temperature": 0}
    assert len(_post(f"{url}/v1/completions", prompt)["choices"][0]["text"]) > 0
    deadline = time.monotonic() + STOP_SECONDS
    while not (directory / "step_2" / "step.json").exists():
        assert time.monotonic() < deadline, "the steps are not stored while the server runs"
        time.sleep(0.1)
    assert tlcore.open_run(directory).state == "incomplete"

    server.send_signal(signal.SIGTERM)
    server.wait(STOP_SECONDS)
    run = tlcore.open_run(directory)
    assert run.state == "complete", log.read_text()
    assert run.steps == [0, 2]
    assert run.step(0).calls == ["model.embed_tokens", "model.layers.3.mlp"]
    assert run.verify() > 0
    first, later = (row for number in (0, 2) for row in run.step(number).rows or ())
    assert first["external_request_id"] == later["external_request_id"] == "cmpl-AAA-0"
    assert first["request_id"] == later["request_id"] != "cmpl-AAA-0"
    assert (first["first_position"], later["rows"]) == (0, 1)
    assert later["first_position"] == first["rows"] + 1
