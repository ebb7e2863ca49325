"""Tells of a worker or an engine that died while it captured: of what, and what is left of its run.

vLLM itself notices and ends the engine. What is told here is told before that, in the process that started
the dead one, since nobody else learns its exit status: to the log, and in a notice for `attach`.
"""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any

from ....ledger import Counts
from ....locations import is_url
from ....record import Json, is_running
from ..reports import Report, leave_notice, read_notices, read_reports
from .status import Status, merged

log = logging.getLogger("vllm.tlcore")
_MARK = "__tlcore__"
# A process that somebody asked to end has not died of anything.
_ASKED = (signal.SIGTERM, signal.SIGINT)
# How long a process that ends may take to its exit status, and the one that learns it to say so.
_ENDING_S = 5.0
_LOOK_S = 0.05


def patch_executor(module: ModuleType) -> None:
    """Look at the workers when an executor ends because one of them has. Safe to repeat."""

    def tell(executor: Any) -> None:
        if getattr(executor, "is_failed", False):
            processes = [getattr(handle, "proc", None) for handle in getattr(executor, "workers", None) or ()]
            tell_of_deaths(process for process in processes if process is not None)

    _before(getattr(module, "MultiprocExecutor", None), "shutdown", tell)


def patch_engines(module: ModuleType) -> None:
    """Look at the engines when the one who started them ends because one of them has. Safe to repeat."""

    def tell(manager: Any) -> None:
        stopped = getattr(manager, "manager_stopped", None)
        if stopped is None or not stopped.is_set():
            tell_of_deaths(getattr(manager, "processes", ()))

    _before(getattr(module, "CoreEngineProcManager", None), "shutdown", tell)


def _before(cls: Any, name: str, act: Callable[[Any], None]) -> None:
    original = getattr(cls, name, None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            act(self)
        except Exception:
            log.debug("the deaths of processes could not be told", exc_info=True)
        return original(self, *args, **kwargs)

    wrapped.__dict__[_MARK] = True
    setattr(cls, name, wrapped)


def tell_of_deaths(processes: Iterable[Any]) -> None:
    """Log how each of these processes died that captured, or whose child did, and leave notices."""
    for process in processes:
        status = _exit_status(process)
        if status in (None, 0) or -status in _ASKED:
            continue
        for report in read_reports():
            if process.pid in (report.process, report.document["parent"]) and report.run_id is not None:
                _tell(process, report)


def _exit_status(process: Any) -> int | None:
    """A process's exit status; None while it runs.

    One that ends closes what it had open, which is how others learn of it, a moment before it has a status.
    """
    sentinel = getattr(process, "sentinel", None)
    if process.exitcode is None and sentinel is not None and wait([sentinel], 0):
        process.join(_ENDING_S)
    status: int | None = process.exitcode
    return status


def _tell(process: Any, report: Report) -> None:
    own = process.pid == report.process
    what = f"the worker of rank {report.rank}" if own else f"the engine {process.name}"
    text = f"{what} (process {process.pid}) {_cause(process.exitcode)}. {left(report)}"
    leave_notice(report, text)
    if report.status["state"] != "closed":
        log.error("%s", text)


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-exitcode} ({name})"


def left(report: Report) -> str:
    """What was captured until a process died: as it said itself last, and as the disk says."""
    url, counts = str(report.status["url"]), Counts.from_json(report.status["ledger"])
    last = f"{report.age_s:.1f} s before, it had captured {counts.captured} tensors"
    found = committed(url)
    if found is None:
        return f"{last} and stored {counts.stored} of them in {url}"
    steps, stored = found
    return f"{last}; {steps} steps lie whole in {url}, with {stored.stored} tensors that can be read"


def committed(url: str) -> tuple[int, Counts] | None:
    """How many steps of a run on the local disk are whole, and their ledger; None where it cannot be said.

    A run elsewhere is not asked for: a process that ends must not wait for a network.
    """
    from ....reader import open_run

    if is_url(url):
        return None
    try:
        run = open_run(url)
        return len(run.steps), run.ledger
    except Exception:
        log.debug("the run of a process that died could not be read", exc_info=True)
        return None


def remains(run_id: str) -> Status | None:
    """The status of a run whose engine answers no more, from what its workers left; None without a trace.

    It is ``closing`` while a worker still runs (it ends by itself, and stores what it has first).
    """
    notices = _notices(run_id)
    answers: list[Json] = []
    for report in read_reports():
        if report.run_id != run_id:
            continue
        answer = {**report.status, "rank": report.rank}
        if answer["state"] != "closed":
            answer["state"] = "closing" if report.alive else "lost"
            text = f"the worker of rank {report.rank} (process {report.process}) has died. {left(report)}"
            answer["problem"] = notices.get(report.process, text)
        answers.append(answer)
    if not answers:
        return None
    status = merged(answers)
    found = committed(str(status.url)) if status.state == "lost" else None
    return status if found is None else replace(status, ledger=found[1])


def _notices(run_id: str) -> dict[int, str]:
    """What is told of the deaths of a run's workers; one that somebody is still to tell of is waited for."""
    end = time.monotonic() + _ENDING_S
    while True:
        notices = {notice["process"]: str(notice["problem"]) for notice in read_notices(run_id)}
        untold = (report for report in read_reports() if report.run_id == run_id and _is_untold(report))
        if time.monotonic() >= end or not any(report.process not in notices for report in untold):
            return notices
        time.sleep(_LOOK_S)


def _is_untold(report: Report) -> bool:
    """Whether a worker died in its run, and the process that started it is there to say of what."""
    if report.status["state"] == "closed" or report.alive:
        return False
    return is_running(report.document["parent"])
