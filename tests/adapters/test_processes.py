"""Processes that answer, and those that do not: each wait has an end, and shows what was said."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tlcore.adapters.processes import ProcessError, run_module

MODULE = """
import os, subprocess, sys, time
from tlcore.adapters.processes import answer

def work(settings, directory):
    print("it begins", flush=True)
    what = settings["what"]
    if what == "wait":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
        time.sleep(600)
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "raise":
        raise ValueError("no such thing")
    return {"twice": 2 * settings["number"], "variable": os.environ["TLCORE_OF_TEST"]}

answer(work)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worked_on.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_a_process_answers_and_its_environment_is_the_users_where_he_has_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, default = {"what": "", "number": 4}, {"TLCORE_OF_TEST": "default"}
    answered = run_module("worked_on", settings, tmp_path / "one", 120, default)
    assert answered == {"twice": 8, "variable": "default"}
    monkeypatch.setenv("TLCORE_OF_TEST", "mine")
    assert run_module("worked_on", settings, tmp_path / "two", 120, default)["variable"] == "mine"


@pytest.mark.parametrize(
    ("what", "problem", "said"),
    [("die", "it ended with signal 9", "it begins"), ("raise", "it ended with status 1", "no such thing")],
)
def test_one_that_fails_is_told_with_its_log(what: str, problem: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessError) as failed:
        run_module("worked_on", {"what": what}, tmp_path / "place", 120)
    assert failed.value.problem == problem and said in failed.value.log and said in str(failed.value)


def test_one_that_does_not_end_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="has not ended after 8 s"):
        run_module("worked_on", {"what": "wait"}, tmp_path / "place", 8)
    said = (tmp_path / "place" / "log.txt").read_text().split()
    child = int(said[said.index("child") + 1])
    end = time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < end
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
