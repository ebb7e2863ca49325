"""The figures that workers leave in files, and the Prometheus registries that show them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.adapters.vllm.helpers import run
from tests.waiting import wait_until
from tlcore.adapters.vllm import reports
from tlcore.adapters.vllm.metrics import METRICS, patch_registry, read_figures
from tlcore.adapters.vllm.reports import VARIABLE, Publisher

FIGURES = dict.fromkeys(METRICS, 1.0)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def test_figures_are_published_while_they_change_and_at_the_end(directory: Path) -> None:
    figures = dict(FIGURES)
    publisher = Publisher(3, lambda: dict(figures))
    wait_until(read_figures, "the figures are published", 60)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    figures["stored_tensors"] = 5.0
    publisher.close()
    figures["stored_tensors"] = 6.0
    publisher.close()
    assert read_figures() == {3: {**FIGURES, "stored_tensors": 5.0}}
    assert [path.suffix for path in directory.iterdir()] == [".json"]


def test_a_ranks_processes_are_added_up_and_damaged_files_left_out(directory: Path) -> None:
    directory.mkdir()
    for name, text in {
        f"{os.getpid()}_0.json": json.dumps({"rank": 0, **FIGURES}),
        f"{os.getppid()}_0.json": json.dumps({"rank": 0, **FIGURES}),
        f"{os.getpid()}_1.json": json.dumps({"rank": 1, **FIGURES}),
        "4_1.json": "{",
        "5_1.json": json.dumps({"rank": 1}),
        "x_1.json": json.dumps({"rank": 1, **FIGURES}),
    }.items():
        (directory / name).write_text(text)
    assert read_figures() == {0: {**dict.fromkeys(METRICS, 2.0)}, 1: FIGURES}


def test_a_process_that_has_died_still_counts_but_does_nothing(directory: Path) -> None:
    directory.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    (directory / f"{gone.pid}_0.json").write_text(json.dumps({"rank": 0, **FIGURES}))
    found = read_figures()[0]
    assert {name for name, value in found.items() if value == 0} == {"queue_bytes", "running"}


def test_another_run_is_published_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_EVERY_S", 600.0)
    figures = dict(FIGURES)
    publisher = Publisher(0, lambda: dict(figures))
    wait_until(read_figures, "the figures are published", 60)
    figures["running"] = 2.0
    publisher.publish()
    wait_until(lambda: read_figures()[0]["running"] == 2.0, "they are published again", 60)
    publisher.close()


def test_a_directory_that_is_a_link_is_not_read(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1_0.json").write_text(json.dumps({"rank": 0, **FIGURES}))
    assert read_figures() == {}
    directory.symlink_to(tmp_path / "other")
    assert read_figures() == {}


@pytest.mark.parametrize("several_processes", [False, True])
def test_vllms_registry_shows_them_in_either_mode(directory: Path, several_processes: bool) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    directory.mkdir()
    (directory / "1_0.json").write_text(json.dumps({"rank": 0, **FIGURES}))
    shared = CollectorRegistry()
    module: Any = ModuleType("vllm.v1.metrics.prometheus")
    module.get_prometheus_registry = lambda: CollectorRegistry() if several_processes else shared
    patch_registry(module)
    patch_registry(module)
    for _ in range(2):
        text = generate_latest(module.get_prometheus_registry()).decode()
    assert text.count('tlcore_stored_tensors_total{rank="0"} 1.0') == 1
    assert "# TYPE tlcore_queue_bytes gauge" in text


def _scraped(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> str:
    """What a server shows that lets prometheus-fastapi-instrumentator build the registry of each scrape."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from prometheus_client import CollectorRegistry
    from prometheus_fastapi_instrumentator import Instrumentator

    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "shared"))
    directory.mkdir()
    (directory / f"{os.getpid()}_{rank}.json").write_text(json.dumps({"rank": rank, **FIGURES}))
    app = FastAPI()
    Instrumentator(registry=CollectorRegistry()).instrument(app).expose(app)
    return TestClient(app).get("/metrics").text


def test_one_of_several_api_servers_shows_them_too(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_registry(ModuleType("vllm.v1.metrics.prometheus"))
    text = _scraped(directory, tmp_path, monkeypatch, 5)
    assert text.count('tlcore_stored_tensors_total{rank="5"} 1.0') == 1


def test_the_front_end_removes_the_directory_that_it_shared() -> None:
    done = run(
        "-c",
        "import os, sys\n"
        "from tlcore.adapters.vllm import reports as metrics\n"
        "os.environ.pop(metrics.VARIABLE, None)\n"
        "metrics.share_directory(); metrics.share_directory()\n"
        "path = os.environ[metrics.VARIABLE]\n"
        "assert not os.path.exists(path)\n"
        "metrics.Publisher(0, dict).close()\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "assert os.path.isdir(path)\n"
        "print(path)\n",
    )
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(done.stdout.strip())
