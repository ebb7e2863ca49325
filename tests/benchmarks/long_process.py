"""A capture of many steps in a process of its own.

``python -m tests.benchmarks.long_process loop|growth|decode ARGUMENTS`` prints its figures as one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn

from tests.faults.helpers import usage_of
from tlcore.engine.capture import capture

from .rows import SCALES
from .subprocesses import print_report
from .workload import workload

STEP_S = 0.01
ROWS, WIDTH = 8, 576
# Until here everything that a long run needs has been made.
SETTLED_AT = 1000


def loop(steps: int, keys: dict[str, Any]) -> dict[str, Any]:
    """One layer, 18 KB and 10 ms a step: the loop without capture, with it, and what comes after it.

    The input is another one in every step, as it is in a model that generates.
    """
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16))
    inputs = torch.randn(steps, ROWS, WIDTH).to(torch.bfloat16)

    def run() -> list[float]:
        begin = _thread_times()
        with torch.no_grad():
            for step in range(steps):
                model(inputs[step])
                time.sleep(STEP_S)
        return [after - before for before, after in zip(begin, _thread_times(), strict=True)]

    with torch.no_grad(), capture(model, **_keys(keys), module_call_match=["^0$"]):
        # What the first capture of a process loads.
        model(inputs[0])
    plain = [run()]
    with capture(model, **_keys(keys), module_call_match=["^0$"]) as captured:
        with_capture = run()
        begin = time.perf_counter()
    rest_s = time.perf_counter() - begin
    plain.append(run())
    counts = captured.ledger
    if counts.stored != counts.captured:
        raise RuntimeError(f"not everything was stored: {counts.to_json()}")
    # Without capture: the mean of before and after.
    without = [sum(each) / 2 for each in zip(*plain, strict=True)]
    return {
        "plain_s": without[0],
        "captured_s": with_capture[0],
        "null": plain[1][0] / plain[0][0],
        "processor_s": with_capture[1] - without[1],
        "queued_s": with_capture[2] - without[2],
        "rest_s": rest_s,
        "bytes": counts.bytes_captured,
        "url": captured.url,
    }


def _thread_times() -> tuple[float, float, float]:
    """Seconds now: on the wall, on a processor in this thread, and waiting for one (0 where nobody tells)."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            queued_s = int(file.read().split()[1]) / 1e9
    except OSError:
        queued_s = 0.0
    return time.perf_counter(), time.thread_time(), queued_s


def growth(steps: int, keys: dict[str, Any]) -> dict[str, Any]:
    """As many small steps as go; resident memory when settled, and at the end.

    No model is that much faster than its storage: so that no more than `SETTLED_AT` steps wait, as the queue
    would let them, what there is is stored after so many.
    """
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.zeros(2, 8)
    memory: dict[int, int] = {}
    settled_at = min(SETTLED_AT, steps)
    begin = time.perf_counter()
    with torch.no_grad(), capture(model, **_keys(keys), module_call_match=["^0$"]) as captured:
        for step in range(steps):
            x.fill_(float(step))
            model(x)
            if (step + 1) % SETTLED_AT == 0 or step + 1 == steps:
                captured.session.flush()
            if step + 1 in (settled_at, steps):
                memory[step + 1] = usage_of("self").memory
    counts = captured.ledger
    if counts.stored != counts.captured:
        raise RuntimeError(f"not everything was stored: {counts.to_json()}")
    return {
        "settled": memory[settled_at],
        "ended": memory[steps],
        "url": captured.url,
        "step_s": (time.perf_counter() - begin) / steps,
    }


def decode(scale: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Decode steps of a whole model, each with other tokens, as a server makes them."""
    size = SCALES[scale]
    work = workload("decode", size)
    (name, tokens), *more = work.inputs.items()
    with torch.inference_mode(), capture(work.model, **_keys(keys)) as captured:
        for step in range(size.decode_steps):
            work.model(**{name: (tokens + 7 * step) % 499 + 1, **dict(more)})
    return {"url": captured.url, "bytes": captured.ledger.bytes_captured, "steps": size.decode_steps}


def _keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {"log_step_ids": [], "block_s": 600, **keys}


if __name__ == "__main__":
    kind, size, text = sys.argv[1:]
    if kind == "decode":
        print_report(decode(size, json.loads(text)))
    else:
        print_report({"loop": loop, "growth": growth}[kind](int(size), json.loads(text)))
