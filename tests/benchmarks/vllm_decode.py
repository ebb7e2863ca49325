"""Every decode step of eight requests captured, all modules, under vLLM (eager).

As vLLM starts an engine by itself, its worker bound to processors of its own; and within this process.
"""

from __future__ import annotations

from statistics import median

from .rows import Limit, Row, Scale, at_most
from .subprocesses import report
from .timing import Times, interval, ratio

_TARGETS: dict[str, Limit] = {"safetensors": at_most(1.12)}


def table(scale: Scale) -> list[Row]:
    """The slowdown of the mean step against no capture, with its 95 % interval."""
    served = report("vllm_served", scale.name)
    steps = served["steps"]
    busy = "steps under vLLM in which requests come and go"
    inside = report("vllm_engine", "decode", scale.name)
    threads = f", {inside['torch_threads']} torch threads"
    return [
        *_rows(f"the first {steps} decode steps under vLLM", served["first"]),
        *_rows(f"{2 * steps} decode steps after these", served["later"]),
        *_rows(busy, served["busy"], has_target=False),
        *_rows(f"the first {steps} decode steps under vLLM in process", inside["times"], threads),
    ]


def _rows(what: str, times: Times, more: str = "", has_target: bool = True) -> list[Row]:
    rows = []
    for name in times:
        if name == "plain":
            continue
        low, high = interval(times, name, "plain")
        shown = f"{median(times[name]) * 1e3:.1f} ms / {median(times['plain']) * 1e3:.1f} ms a step"
        rows.append(
            Row(
                f"{what}, {name} / no capture",
                ratio(times, name, "plain"),
                _TARGETS.get(name) if has_target else None,
                "",
                f"{low:.2f} to {high:.2f}; {shown}{more}",
            )
        )
    return rows
