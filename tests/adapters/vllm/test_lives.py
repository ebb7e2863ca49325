"""An engine lives as long as its owner holds it, whoever captures it; and its death is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.adapters.vllm.helpers import REPOSITORY, all_stored, report

pytestmark = pytest.mark.slow
SCRIPT = str(REPOSITORY / "tests" / "adapters" / "vllm" / "lives_script.py")


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lives")


@pytest.fixture(scope="module")
def said(output_dir: Path) -> dict[str, Any]:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return report(SCRIPT, str(output_dir), timeout=900, environment=environment)


def test_an_engine_ends_with_its_owner_whoever_was_attached(said: dict[str, Any], output_dir: Path) -> None:
    assert said["left"] == [{}] * 2
    runs = [tlcore.open_run(path) for path in sorted(output_dir.iterdir())]
    assert [run.state for run in runs] == ["complete"] * 3 + ["incomplete"]
    assert all(all_stored(run.ledger) and run.ledger.stored == run.verify() for run in runs)


def test_one_that_was_detached_keeps_its_last_status(said: dict[str, Any], output_dir: Path) -> None:
    first, again = said["detached"]
    run = tlcore.open_run(first["url"])
    assert first == again
    assert (first["state"], first["problem"]) == ("closed", None)
    assert first["ledger"] == run.ledger.to_json()


def test_one_that_is_still_attached_learns_the_end(said: dict[str, Any]) -> None:
    first, again = said["attached"]
    run = tlcore.open_run(first["url"])
    assert first == again
    assert (first["state"], first["problem"]) == ("closed", None)
    assert first["ledger"] == run.ledger.to_json()


def test_a_killed_worker_is_told_with_its_signal_and_what_is_left(said: dict[str, Any]) -> None:
    assert said["generate"] == "EngineDeadError"
    worker, first, again = said["lost"]
    run = tlcore.open_run(first["url"])
    assert first == again and first["state"] == "lost"
    assert f"the worker of rank 0 (process {worker}) was killed by signal 9 (SIGKILL)" in first["problem"]
    assert f"{len(run.steps)} steps lie whole in {run.url}" in first["problem"]
    assert first["ledger"] == run.ledger.to_json() and run.ledger.captured > 0
    assert "the engine" in said["change"]
