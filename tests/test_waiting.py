"""No test waits without an end, and one whose server died says what the server said."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import join, tails, time_limit, wait_until, watched

TESTS = Path(__file__).parent
RUNS = {"run", "call", "check_call", "check_output"}
WAITS = {"wait", "join", "communicate", "result", "acquire"}


def endless(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a program that wait for something that may never come."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords}
            name, target = node.func.attr, ast.unparse(node.func.value)
            if target == "subprocess" and name in RUNS and "timeout" not in keywords:
                yield node.lineno, f"subprocess.{name} without timeout"
            if name in WAITS and not node.args and not keywords & {"timeout", "blocking"}:
                yield node.lineno, f"{target}.{name}() without timeout"
            if name == "urlopen" and "timeout" not in keywords:
                yield node.lineno, "urlopen without timeout"
        if isinstance(node, ast.While):
            text = ast.unparse(node)
            counted = {ast.unparse(each.target) for each in ast.walk(node) if isinstance(each, ast.AugAssign)}
            names = {ast.unparse(each) for each in ast.walk(node.test) if isinstance(each, ast.Name)}
            if ".sleep(" in text and "monotonic" not in text and not counted & names:
                yield node.lineno, "a loop that sleeps until something happens, and no longer"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("subprocess.run(command, check=True)", 1),
        ("subprocess.run(command, timeout=3)", 0),
        ("process.wait()", 1),
        ("process.wait(3)", 0),
        ("thread.join()", 1),
        ("' '.join(words)", 0),
        ("process.communicate(timeout=3)", 0),
        ("lock.acquire(blocking=False)", 0),
        ("while not path.exists():\n    time.sleep(1)", 1),
        ("while time.monotonic() < end:\n    time.sleep(1)", 0),
        ("while left > 0:\n    left -= 1\n    time.sleep(1)", 0),
        ("urlopen(url)", 0),
        ("urllib.request.urlopen(url)", 1),
    ],
)
def test_what_waits_without_an_end_is_known(source: str, found: int) -> None:
    assert len(list(endless(source))) == found


def test_no_test_waits_without_an_end() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, text in endless(path.read_text())
    ]
    assert found == [], "\n".join(found)


def _speaker(tmp_path: Path, program: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=output, stderr=subprocess.STDOUT)
    return process, log


def test_a_wait_ends_with_the_log_of_a_server_that_died(tmp_path: Path) -> None:
    chatter = "nanobind: leaked 1 types!\\n - leaked type x"
    says = f"print('first'); print('out of luck'); print('{chatter}'); raise SystemExit(3)"
    process, log = _speaker(tmp_path, says)
    with watched("the server", process, log) as entry:
        begin = time.monotonic()
        with pytest.raises(pytest.fail.Exception, match=r"the server has ended with status 3(.|\n)*luck"):
            wait_until(lambda: False, "never", 60)
        assert time.monotonic() - begin < 30
        assert dict(tails()) == {"log of the server (ended with status 3)": "first\nout of luck"}
        entry.may_end = True
        with pytest.raises(pytest.fail.Exception, match="still not so: never"):
            wait_until(lambda: False, "never", 0.1)
    assert list(tails()) == []


def test_a_wait_returns_once_it_is_so() -> None:
    answers = iter([0, "", [1]])
    wait_until(lambda: next(answers), "the third answer", 10)
    assert list(answers) == []


def test_a_thread_that_stays_fails_the_test() -> None:
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait, args=(60,), name="stays")
    thread.start()
    with pytest.raises(AssertionError, match="stays still runs"):
        join(thread, 0.1)
    ends.set()
    join([thread])


def _wait_for_a_lock() -> None:
    threading.Event().wait(60)


def _wait_for_a_process() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=60)


@pytest.mark.parametrize("wait", [_wait_for_a_lock, _wait_for_a_process])
def test_the_last_resort_ends_any_wait_of_the_main_thread(wait: Callable[[], None]) -> None:
    with pytest.raises(pytest.fail.Exception, match="the wait still ran"), time_limit(0.3, "the wait"):
        wait()
    with time_limit(0.2, "nothing"):
        pass
    time.sleep(0.3)
