"""Every one of 50 decode steps of eight requests captured, all modules, under vLLM (eager)."""

from __future__ import annotations

from statistics import median

from .rows import Limit, Row, Scale, at_most
from .subprocesses import report
from .timing import ratio

_TARGETS: dict[str, Limit] = {"safetensors": at_most(1.12)}


def table(scale: Scale) -> list[Row]:
    """The slowdown of the mean step against no capture."""
    measured = report("vllm_engine", "decode", scale.name)
    times = measured["times"]
    threads = measured["torch_threads"]
    return [
        Row(
            f"{scale.decode_steps} decode steps under vLLM, {name} / no capture",
            ratio(times, name, "plain"),
            _TARGETS.get(name),
            "",
            f"{median(times[name]) * 1e3:.1f} ms / {median(times['plain']) * 1e3:.1f} ms a step,"
            f" {threads} torch threads",
        )
        for name in times
        if name != "plain"
    ]
