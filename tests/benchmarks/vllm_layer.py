"""One layer, all rows, of 64 prompts of 64 tokens with 64 more generated for each, under vLLM (eager)."""

from __future__ import annotations

from statistics import median

from .rows import Row, Scale, at_most
from .subprocesses import report
from .timing import ratio


def table(scale: Scale) -> list[Row]:
    """The whole time against no capture, beside hooks on the same layer that call `torch.save`."""
    measured = report("vllm_engine", "layer", scale.name, timeout_s=3600)
    times = measured["times"]
    shown = {name: f"{median(each):.2f}" for name, each in times.items()}
    named = {"captured": "tlcore", "torch.save": "hooks with torch.save", "again": "no capture once more"}
    flush = f", then {median(measured['flush_s']) * 1e3:.0f} ms until all is stored"
    return [
        Row(
            f"one layer of 64 requests under vLLM, {what} / no capture",
            ratio(times, name, "plain"),
            at_most(1.03) if name == "captured" else None,
            "",
            f"{shown[name]} s / {shown['plain']} s{flush if name == 'captured' else ''}",
        )
        for name, what in named.items()
    ]
