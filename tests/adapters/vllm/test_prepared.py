"""Scripts in forks of one process are as ones that were started by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.adapters.vllm.helpers import ENVIRONMENT, REPOSITORY
from tests.adapters.vllm.prepared import Prepared

SCRIPT = """
import atexit, json, multiprocessing, os, sys, time

def work(queue):
    queue.put([__name__, os.environ["GIVEN"]])

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    atexit.register(print, "at the end")
    queue = multiprocessing.SimpleQueue()
    child = multiprocessing.Process(target=work, args=(queue,))
    child.start()
    found = [sys.argv, sys.path[0], os.getcwd(), os.environ["GIVEN"], queue.get(), sys.stdin.read()]
    child.join(60)
    print(json.dumps(found))
    print("said", file=sys.stderr)
    if sys.argv[1] == "wait":
        time.sleep(600)
    raise SystemExit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(REPOSITORY, ENVIRONMENT, ["json"])


@pytest.mark.parametrize("status", [0, 3])
def test_it_is_as_in_a_process_of_its_own(prepared: Prepared, script: str, status: int) -> None:
    given = {**ENVIRONMENT, "GIVEN": f"a value {status}"}
    done = prepared.run([script, str(status)], given, 60)
    alone = subprocess.run(
        [sys.executable, script, str(status)], env=given, cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (alone.returncode, alone.stdout) and done.returncode == status
    assert "at the end" in done.stdout and (done.stderr, alone.stderr) == ("said\n", "said\n")


def test_one_that_does_not_end_is_ended_and_the_next_one_runs(prepared: Prepared, script: str) -> None:
    given = {**ENVIRONMENT, "GIVEN": ""}
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        prepared.run([script, "wait"], given, 1)
    assert time.monotonic() - begin < 60
    assert prepared.run([script, "0"], given, 60).returncode == 0


def test_one_that_is_killed_is_told_by_its_signal(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import os; os.kill(os.getpid(), 9)")
    assert prepared.run([str(path)], dict(os.environ), 60).returncode == -9
