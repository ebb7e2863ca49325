"""What workers say of their captures, in files: readable while a step runs, and after the worker has died.

vLLM's workers are other processes, and asking them would wait for the step that runs. A directory in the
temporary directory costs neither a connection nor a lock; its name travels by environment variable.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...record import Json, is_running, state_of

VARIABLE = "TLCORE_METRICS_DIR"
# As often as the quickest scrapers look.
_EVERY_S = 1.0
# Two changes of a directory within the ticks of a file system's clock have one time.
_TICK_NS = 20_000_000


def share_directory() -> None:
    """Choose the directory for this front end and the workers that it will start. Safe to repeat.

    It is made by the first worker that captures, and removed when this process ends.
    """
    if VARIABLE in os.environ:
        return
    path = os.path.join(tempfile.gettempdir(), f"tlcore-metrics-{uuid.uuid4().hex}")
    os.environ[VARIABLE] = path
    atexit.register(_remove, path, os.getpid())


def shared_directory() -> str:
    """The directory, made if need be. Raises OSError where it cannot be, or is somebody else's."""
    share_directory()
    path = os.environ[VARIABLE]
    os.makedirs(path, mode=0o700, exist_ok=True)
    if not _is_ours(path):
        raise PermissionError(errno.EPERM, "the directory for reports belongs to somebody else", path)
    return path


def _remove(path: str, owner: int) -> None:
    # A forked child has its parent's exit handlers.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


class Publisher:
    """Writes a rank's figures into the shared directory, each second while they change."""

    def __init__(self, rank: int, figures: Callable[[], Json]) -> None:
        directory = os.environ.get(VARIABLE)
        self._path = Path(directory, f"{os.getpid()}_{rank}.json") if directory else None
        self._rank = rank
        self._figures = figures
        self._last: Json = {}
        self._ended = False
        self._wake = threading.Event()
        self._lock = threading.Lock()
        if self._path is not None:
            os.makedirs(self._path.parent, mode=0o700, exist_ok=True)
            threading.Thread(target=self._run, name="tlcore-metrics", daemon=True).start()

    def close(self) -> None:
        """Write the last figures and end. Safe to repeat."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._publish()
        self._wake.set()

    def publish(self) -> None:
        """Write the figures at once: another run begins."""
        with self._lock:
            if not self._ended:
                self._publish()

    def publish_modules(self, run_id: str, modules: Collection[str]) -> None:
        """Write which modules a run captures; once, as they may be many."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                part = self._path.with_suffix(".part")
                part.write_text(json.dumps({"run_id": run_id, "modules": list(modules)}))
                part.rename(self._path.with_suffix(".modules"))

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._ended:
                    return
                self._publish()
            self._wake.wait(_EVERY_S)
            self._wake.clear()

    def _publish(self) -> None:
        figures = self._figures()
        if self._path is None or figures == self._last:
            return
        try:
            part = self._path.with_suffix(".tmp")
            part.write_text(json.dumps({"rank": self._rank, "parent": os.getppid(), **figures}))
            part.rename(self._path)
            self._last = figures
        except OSError:
            # The front end may have ended and removed the directory; nobody looks then.
            return


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker process published last, and how many seconds ago."""

    process: int
    rank: int
    document: Json
    age_s: float

    @property
    def status(self) -> Json:
        """What `WorkerCapture.status` said, with an address that holds no secrets."""
        status: Json = self.document.get("status", {})
        return status

    @property
    def run_id(self) -> str | None:
        """The run that it spoke of."""
        return self.status.get("run_id")

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return is_running(self.process)

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped the process, or its engine, until it is continued."""
        parent = self.document.get("parent")
        return any(state_of(each) in ("T", "t") for each in (self.process, parent) if type(each) is int)


def read_reports() -> Iterator[Report]:
    """What the workers of this front end published; files that are damaged or another user's are left out."""
    for path in _files("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(path.read_text())
            age = time.time() - path.stat().st_mtime
            yield Report(int(path.stem.partition("_")[0]), int(document["rank"]), document, age)


def last_change() -> int | None:
    """When a report was last written, another time for each; None where one that has the same may follow."""
    try:
        changed = os.stat(os.environ[VARIABLE]).st_mtime_ns
    except (KeyError, OSError):
        return None
    return changed if time.time_ns() - changed > _TICK_NS else None


def read_modules(run_ids: Collection[str | None]) -> frozenset[str]:
    """The modules that some runs capture, over all ranks; nothing where a rank's are not known.

    The same object for as long as that is the same, as many requests ask for it.
    """
    ranks: set[frozenset[str]] = set()
    for path in _files("*.modules"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            status = path.stat()
            run_id, modules = _modules_of(path, status.st_ino, status.st_mtime_ns, status.st_size)
            if run_id in run_ids:
                ranks.add(modules)
    return _together(frozenset(ranks)) if frozenset() not in ranks else frozenset()


@functools.lru_cache(maxsize=64)
def _modules_of(path: Path, *state: int) -> tuple[str, frozenset[str]]:
    """The run and modules that a file in this state tells."""
    document = json.loads(path.read_text())
    return document["run_id"], frozenset(document["modules"])


@functools.lru_cache(maxsize=8)
def _together(ranks: frozenset[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*ranks)


def leave_notice(report: Report, problem: str) -> None:
    """Leave word of how a process died for whoever asks after its run."""
    notice = {"process": report.process, "run_id": report.run_id, "problem": problem}
    directory = os.environ.get(VARIABLE)
    with contextlib.suppress(OSError):
        if directory and _is_ours(directory):
            part = Path(directory, f"{report.process}.part")
            part.write_text(json.dumps(notice))
            part.rename(part.with_suffix(".death"))


def read_notices(run_id: str) -> list[Json]:
    """The notices of processes that died while they captured a run."""
    found = []
    for path in sorted(_files("*.death")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            notice = json.loads(path.read_text())
            if notice["run_id"] == run_id:
                found.append(notice)
    return found


def _files(pattern: str) -> list[Path]:
    directory = os.environ.get(VARIABLE)
    try:
        return [*Path(directory).glob(pattern)] if directory and _is_ours(directory) else []
    except OSError:
        return []


def _is_ours(directory: str) -> bool:
    status = os.lstat(directory)
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())
