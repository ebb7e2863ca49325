"""Processes that capture and die: how a test starts, kills and questions them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_ENOUGH_S = 120.0


@dataclass
class Death:
    """What was heard of a child: its run's URL, the steps it said were stored, its exit status."""

    url: str | None = None
    stored: list[int] = field(default_factory=list)
    status: int | None = None


class Workers:
    """Children of one warm process, one at a time."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._child = 0

    def run(
        self,
        keys: dict[str, Any],
        ends: str = "forever",
        kill_after_s: float | None = None,
        from_first_step: bool = False,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> Death:
        """Start a child, kill it after ``kill_after_s`` seconds if given, and wait until it is gone.

        With ``from_first_step`` the seconds begin when the child's first steps are stored, else at once.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"keys": keys, "ends": ends}) + "\n")
        self._process.stdin.flush()
        death = Death()
        end = time.monotonic() + _ENOUGH_S
        while death.status is None:
            assert time.monotonic() < end, "the child does not end"
            said = self._hear(death)
            first_step = "stored" in said and len(death.stored) == 1
            if first_step:
                on_first_step()
            begins = first_step if from_first_step else "pid" in said
            if begins and kill_after_s is not None:
                threading.Timer(kill_after_s, _kill, (self._child,)).start()
        return death

    def _hear(self, death: Death) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process that forks children has died: {self.errors()}"
        said: dict[str, Any] = json.loads(line)
        self._child = said.get("pid", self._child)
        death.url = said.get("url", death.url)
        if "stored" in said:
            death.stored.append(said["stored"])
        death.status = said.get("ended", death.status)
        return said

    def errors(self) -> str:
        """What the children have written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def workers(log: Path) -> Iterator[Workers]:
    """The warm process; ``log`` gets its standard error."""
    with log.open("w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Workers(process, errors)
        finally:
            process.kill()
            process.communicate(timeout=30)
