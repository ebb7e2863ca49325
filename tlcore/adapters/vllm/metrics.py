"""Prometheus metrics beside vLLM's own: the front end shows what the workers publish."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ...record import Json
from .reports import read_reports

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


def read_figures() -> dict[int, Json]:
    """The figures of each rank, added up over its processes.

    What a process that has died was doing, it does no more; what it counted stays counted.
    """
    found: dict[int, Json] = defaultdict(lambda: dict.fromkeys(METRICS, 0))
    for report in read_reports():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            figures = {name: float(report.document[name]) for name in METRICS}
            alive, own = report.alive, found[report.rank]
            for name, value in figures.items():
                own[name] += value if alive or METRICS[name][1] else 0
    return dict(sorted(found.items()))


class CaptureCollector:
    """What a Prometheus registry asks for the metrics, ``tlcore_<name>`` with the label ``rank``."""

    def collect(self) -> Iterator[Any]:
        """The metrics of all ranks as they stand."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        ranks = read_figures()
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
    """Have every registry that vLLM's server shows have the metrics too. Safe to repeat.

    With several API servers a registry is made anew for each scrape, by more than one library; all of them
    give it prometheus_client's collector of many processes.
    """
    from prometheus_client.multiprocess import MultiProcessCollector

    original = getattr(module, "get_prometheus_registry", None)
    if original is not None and not hasattr(original, _MARK):
        module.__dict__["get_prometheus_registry"] = _with_ours(original)
    if not hasattr(MultiProcessCollector.__init__, _MARK):
        setattr(MultiProcessCollector, "__init__", _joined(MultiProcessCollector.__init__))  # noqa: B010


def _with_ours(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(original)
    def get_prometheus_registry() -> Any:
        registry = original()
        _register(registry)
        return registry

    get_prometheus_registry.__dict__[_MARK] = True
    return get_prometheus_registry


def _joined(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        original(self, registry, *args, **kwargs)
        if registry:
            _register(registry)

    init.__dict__[_MARK] = True
    return init


def _register(registry: Any) -> None:
    # A registry that lives on has them already.
    with contextlib.suppress(ValueError):
        registry.register(_collector)
