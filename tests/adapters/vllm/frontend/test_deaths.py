"""Processes that die while they capture: of what, and what is left of their run, is told."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.waiting import wait_until
from tlcore.adapters.vllm.frontend.deaths import patch_engines, patch_executor, remains, tell_of_deaths
from tlcore.adapters.vllm.reports import VARIABLE, Publisher, read_reports

FORK = multiprocessing.get_context("fork")
STEPS = 3


@pytest.fixture(autouse=True)
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "reports"))
    return tmp_path / "reports"


def _capture_and(end: Callable[[], None], output_dir: str) -> None:
    """What a worker does: captures, publishes, ends in some way with its run open."""
    faulthandler.disable()
    model = nn.Sequential(nn.Linear(4, 4))
    captured = tlcore.capture(model, output_dir=output_dir, log_step_ids=[])
    captured.__enter__()
    for _ in range(STEPS):
        model(torch.randn(2, 4))
    captured.session.flush()

    def figures() -> dict[str, Any]:
        ledger = captured.ledger.to_json()
        status = {
            "run_id": captured.session.run_id,
            "url": captured.url,
            "state": "running",
            "ledger": ledger,
        }
        return {"status": status}

    Publisher(0, figures)
    wait_until(lambda: [*read_reports()], "the figures are published")
    end()


def _killed(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _dead(end: Callable[[], None], tmp_path: Path) -> Any:
    process = FORK.Process(target=_capture_and, args=(end, str(tmp_path / "runs")), name="Worker-0")
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process


def _executor(processes: list[Any], failed: bool) -> Any:
    """An executor of vLLM's form, patched; its own end is recorded."""

    class MultiprocExecutor:
        def __init__(self) -> None:
            self.is_failed, self.ended = failed, False
            self.workers = [SimpleNamespace(proc=process) for process in processes]

        def shutdown(self) -> None:
            self.ended = True

    module = ModuleType("executor")
    module.__dict__["MultiprocExecutor"] = MultiprocExecutor
    patch_executor(module)
    patch_executor(module)
    return MultiprocExecutor()


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (_killed(signal.SIGKILL), "was killed by signal 9 (SIGKILL)"),
        (_killed(signal.SIGSEGV), "was killed by signal 11 (SIGSEGV)"),
        (lambda: os._exit(7), "ended with exit status 7"),
    ],
    ids=["SIGKILL", "SIGSEGV", "exit"],
)
def test_a_worker_that_died_is_told_with_its_cause_and_its_run(
    end: Callable[[], None], cause: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = _dead(end, tmp_path)
    executor = _executor([process], failed=True)
    executor.shutdown()
    assert executor.ended
    (run,) = map(tlcore.open_run, (tmp_path / "runs").iterdir())
    (told,) = (each.getMessage() for each in caplog.records if each.levelno == logging.ERROR)
    assert f"the worker of rank 0 (process {process.pid}) {cause}" in told
    assert f"{STEPS} steps lie whole in {run.url}, with {run.ledger.stored} tensors" in told
    status = remains(run.id)
    assert status is not None and (status.state, status.problem, status.url) == ("lost", told, run.url)
    assert status.ledger.captured == status.ledger.stored == run.ledger.stored > 0


def test_a_worker_that_has_no_exit_status_yet_is_told_all_the_same(tmp_path: Path) -> None:
    process = _dead(_killed(signal.SIGKILL), tmp_path)
    (report,) = read_reports()

    class Ending:
        """A process that has closed its files, as `multiprocessing` shows it."""

        def __init__(self) -> None:
            self.sentinel, writer = os.pipe()
            os.close(writer)
            self.pid, self.name, self.exitcode = process.pid, process.name, None

        def join(self, timeout: float) -> None:
            self.exitcode = process.exitcode

    told = threading.Timer(0.2, tell_of_deaths, [[Ending()]])
    told.start()
    status = remains(str(report.run_id))
    told.join(60)
    assert status is not None and "was killed by signal 9 (SIGKILL)" in str(status.problem)


def test_who_is_asked_to_end_has_not_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = _dead(_killed(signal.SIGTERM), tmp_path)
    _executor([process], failed=True).shutdown()
    died = _dead(_killed(signal.SIGKILL), tmp_path)
    _executor([died], failed=False).shutdown()
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_a_process_that_captured_nothing_is_not_ours_to_tell_of(caplog: pytest.LogCaptureFixture) -> None:
    process = FORK.Process(target=_killed(signal.SIGKILL))
    process.start()
    process.join(60)
    tell_of_deaths([process])
    assert caplog.records == []
    assert remains("none") is None


def test_an_engine_that_died_is_told_by_its_workers_reports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker, whose parent it is, may outlive it to end its run."""

    def engine() -> None:
        worker = FORK.Process(target=_capture_and, args=(lambda: os._exit(0), str(tmp_path / "runs")))
        worker.start()
        worker.join(60)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=engine, name="EngineCore_DP0")
    process.start()
    process.join(60)

    class CoreEngineProcManager:
        processes = (process,)
        ended = False

        def shutdown(self, timeout: float | None = None) -> None:
            self.ended = True

    module = ModuleType("utils")
    module.__dict__["CoreEngineProcManager"] = CoreEngineProcManager
    patch_engines(module)
    manager = CoreEngineProcManager()
    manager.shutdown(timeout=1)
    assert manager.ended
    (told,) = (each.getMessage() for each in caplog.records if each.levelno == logging.ERROR)
    assert told.startswith(f"the engine EngineCore_DP0 (process {process.pid}) was killed by signal 9")


def test_a_worker_that_still_ends_its_run_is_waited_for(tmp_path: Path) -> None:
    """The engine is gone, the worker is this process: what it has is being stored."""
    with tlcore.capture(nn.Sequential(nn.Linear(4, 4)), output_dir=tmp_path / "runs") as captured:
        status = {"run_id": captured.session.run_id, "url": captured.url, "state": "running", "ledger": {}}
        publisher = Publisher(0, lambda: {"status": dict(status)})
        wait_until(lambda: [*read_reports()], "the figures are published")
        found = remains(captured.session.run_id)
        assert found is not None and found.state == "closing"
        status["state"] = "closed"
        publisher.close()
        found = remains(captured.session.run_id)
        assert found is not None and (found.state, found.problem) == ("closed", None)
