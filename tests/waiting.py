"""Waits that end, and what the servers of a test had to say when it failed."""

from __future__ import annotations

import faulthandler
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

_TAIL_BYTES = 6000
# What an interpreter that ends well says of its extension modules, in pages.
_CHATTER = re.compile(r"nanobind: | - leaked | - \.\.\. skipped ")
_EVERY_S = 0.02
_THREAD_S = 120.0


class Watched:
    """A process that tests lean on, and the file with its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log
        self.may_end = False

    def tail(self) -> str:
        """The end of the log, without what says nothing of the server."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not _CHATTER.match(line))[-_TAIL_BYTES:]

    def check(self) -> None:
        """Fail the test, with the log's end, when the process has ended though nobody said it may."""
        status = self.process.poll()
        if status is not None and not self.may_end:
            pytest.fail(f"{self.name} has ended with status {status}; the end of its log:\n{self.tail()}")


_watched: list[Watched] = []


@contextmanager
def watched(name: str, process: subprocess.Popen[bytes], log: Path) -> Iterator[Watched]:
    """While the block runs, waits look after this process, and a failed test shows the end of its log."""
    entry = Watched(name, process, log)
    _watched.append(entry)
    try:
        yield entry
    finally:
        _watched.remove(entry)


def tails() -> Iterator[tuple[str, str]]:
    """The name of each watched process and the end of its log."""
    for each in _watched:
        status = each.process.poll()
        state = "runs" if status is None else f"ended with status {status}"
        yield f"log of {each.name} ({state})", each.tail()


def wait_until(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    """Return once the condition holds; fail with ``what`` after ``within_s``, or when a server has died."""
    end = time.monotonic() + within_s
    while not condition():
        for each in _watched:
            each.check()
        if time.monotonic() > end:
            pytest.fail(f"after {within_s:.0f} s still not so: {what}")
        time.sleep(_EVERY_S)


def join(threads: threading.Thread | Iterable[threading.Thread], within_s: float = _THREAD_S) -> None:
    """Join threads; fail when one of them still runs after ``within_s``."""
    end = time.monotonic() + within_s
    for thread in [threads] if isinstance(threads, threading.Thread) else threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} still runs after {within_s:.0f} s"


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End what runs in the main thread with a failure after ``seconds``, having shown every thread's stack.

    The last resort, for a wait that nobody thought of; without signals (other systems) there is none.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        pytest.fail(f"{what} still ran after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
