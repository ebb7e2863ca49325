"""Prometheus metrics beside vLLM's own: workers leave their figures in files, the front end shows them.

vLLM's workers are other processes, and asking them would wait for the step that runs. A directory in the
temporary directory costs neither a connection nor a lock; its name travels by environment variable.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ...record import Json

VARIABLE = "TLCORE_METRICS_DIR"
# As often as the quickest scrapers look.
_EVERY_S = 1.0
_MARK = "__tlcore__"

# Name, help, whether it is a counter.
METRICS = {
    "captured_tensors": ("Tensors that passed the filters.", True),
    "stored_tensors": ("Tensors that were stored.", True),
    "skipped_tensors": ("Tensors described but not stored, as configured.", True),
    "dropped_tensors": ("Tensors for which the queue had no room.", True),
    "failed_tensors": ("Tensors lost to an error.", True),
    "captured_bytes": ("Bytes of the captured tensors.", True),
    "stored_bytes": ("Bytes written, identical tensors of a step once.", True),
    "blocked_seconds": ("Seconds for which the model waited for room in the queue.", True),
    "queue_bytes": ("Bytes of captured tensors that wait to be written.", False),
    "running": ("1 while a run is being captured.", False),
}


def share_directory() -> None:
    """Choose the directory for this front end and the workers that it will start. Safe to repeat.

    It is made by the first worker that captures, and removed when this process ends.
    """
    if VARIABLE in os.environ:
        return
    path = os.path.join(tempfile.gettempdir(), f"tlcore-metrics-{uuid.uuid4().hex}")
    os.environ[VARIABLE] = path
    atexit.register(_remove, path, os.getpid())


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
        self._ended = threading.Event()
        if self._path is not None:
            os.makedirs(self._path.parent, mode=0o700, exist_ok=True)
            threading.Thread(target=self._run, name="tlcore-metrics", daemon=True).start()

    def close(self) -> None:
        """Write the last figures and end. Safe to repeat."""
        if not self._ended.is_set():
            self._ended.set()
            self._publish()

    def _run(self) -> None:
        self._publish()
        while not self._ended.wait(_EVERY_S):
            self._publish()

    def _publish(self) -> None:
        figures = self._figures()
        if self._path is None or figures == self._last:
            return
        try:
            part = self._path.with_suffix(f".{threading.get_ident()}.tmp")
            part.write_text(json.dumps({"rank": self._rank, **figures}))
            part.rename(self._path)
            self._last = figures
        except OSError:
            # The front end may have ended and removed the directory; nobody looks then.
            return


def read_figures(directory: str) -> dict[int, Json]:
    """The figures of each rank, added up over its processes; those of other users' files are left out."""
    found: dict[int, Json] = defaultdict(lambda: dict.fromkeys(METRICS, 0))
    try:
        paths = [*Path(directory).glob("*.json")] if _is_ours(directory) else []
    except OSError:
        return {}
    for path in paths:
        try:
            document = json.loads(path.read_text())
            figures = {name: float(document[name]) for name in METRICS}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        own = found[int(document["rank"])]
        for name, value in figures.items():
            own[name] += value
    return dict(sorted(found.items()))


def _is_ours(directory: str) -> bool:
    status = os.lstat(directory)
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())


class CaptureCollector:
    """What a Prometheus registry asks for the metrics, ``tlcore_<name>`` with the label ``rank``."""

    def collect(self) -> Iterator[Any]:
        """The metrics of all ranks as they stand."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        directory = os.environ.get(VARIABLE)
        ranks = read_figures(directory) if directory else {}
        for name, (text, counts) in METRICS.items():
            kind = CounterMetricFamily if counts else GaugeMetricFamily
            family = kind(f"tlcore_{name}", f"tlcore: {text}", labels=["rank"])
            for rank, figures in ranks.items():
                family.add_metric([str(rank)], figures[name])
            yield family

    def describe(self) -> Iterator[Any]:
        """The metrics without values, so that a registry need not collect to learn their names."""
        return self.collect()


_collector = CaptureCollector()


def patch_registry(module: ModuleType) -> None:
    """Have vLLM's Prometheus registry show the metrics too. Safe to repeat."""
    original = getattr(module, "get_prometheus_registry", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_prometheus_registry() -> Any:
        registry = original()
        # Outside multiprocess mode the registry is a global one and may have them already.
        with contextlib.suppress(ValueError):
            registry.register(_collector)
        return registry

    get_prometheus_registry.__dict__[_MARK] = True
    module.__dict__["get_prometheus_registry"] = get_prometheus_registry
