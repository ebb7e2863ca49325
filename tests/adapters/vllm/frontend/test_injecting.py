"""Whether requests are kept apart from others: as soon as a worker injects, and known without much ado."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tlcore.adapters.vllm import reports
from tlcore.adapters.vllm.frontend import requests


@pytest.fixture
def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many reports there were each time that they were read; a minute ago nobody injected."""
    monkeypatch.setenv(reports.VARIABLE, str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "tlcore,tlcore.endpoint")
    monkeypatch.setattr(requests, "_told", [])
    found: list[int] = []

    def read() -> Any:
        each = list(reports.read_reports())
        found.append(len(each))
        return each

    monkeypatch.setattr(requests, "read_reports", read)
    report(tmp_path, False)
    past(tmp_path, 60)
    return found


def report(directory: Path, injects: bool) -> None:
    """A worker, for which this process stands, says what it does."""
    part = directory / "report.tmp"
    part.write_text(json.dumps({"rank": 0, "injects": injects}))
    part.rename(directory / f"{os.getpid()}_0.json")


def past(directory: Path, seconds: int) -> None:
    """Let the last change be so long ago."""
    then = time.time() - seconds
    os.utime(directory, (then, then))


def test_what_the_workers_say_is_read_when_it_has_changed(looked: list[int], tmp_path: Path) -> None:
    assert [requests._injects() for _ in range(100)] == [False] * 100 and looked == [1]
    report(tmp_path, True)
    assert requests._injects() and looked == [1, 1]
    past(tmp_path, 30)
    assert all(requests._injects() for _ in range(100)) and looked == [1, 1, 1]


def test_of_changes_that_may_have_one_time_each_is_seen(looked: list[int], tmp_path: Path) -> None:
    for injects in (True, False) * 20:
        report(tmp_path, injects)
        assert requests._injects() is injects
