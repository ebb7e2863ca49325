"""A run of very many steps beside one of few: opening and reading it, and the memory of who captures it.

``--steps`` says how many: small ones, as fast as they go, but through the real pipeline, to a real server.
"""

from __future__ import annotations

import gc
import json
from statistics import median

import tlcore
from tests.servers import Server

from .long import READ_NAME, backend_at, server, sizes_of
from .long_process import SETTLED_AT
from .object_storage import delayed
from .rows import Row, Scale, at_most
from .subprocesses import report
from .timing import interleaved, timed

_SHORT_STEPS = 10
# Of the long run, so that it has about as many segments as one whose steps take as long as a model's.
_COMMIT_S = 0.1


def table(scale: Scale) -> list[Row]:
    """What the long run costs beyond the short one."""
    with server() as place:
        return _growth(place, scale)


def _growth(place: Server, scale: Scale) -> list[Row]:
    steps = scale.long_steps
    urls = {}
    for count in (_SHORT_STEPS, steps):
        keys = {"backend": backend_at(place, f"growth-{count}", commit_s=_COMMIT_S)}
        found = report("long_process", "growth", str(count), json.dumps(keys), timeout_s=3600)
        urls[count] = found["url"]
    requests: dict[int, int] = {}
    with delayed(place, 0) as (counted, asked):

        def read(count: int) -> None:
            run = tlcore.open_run(urls[count], counted.options)
            run.step(count // 2).tensor(f"step_{count // 2}/{READ_NAME}")

        def measure(count: int) -> float:
            # A collection looks at all of PyTorch, whoever is being measured then.
            gc.collect()
            before = len(asked)
            seconds = timed(lambda: read(count))
            requests[count] = len(asked) - before
            return seconds

        measures = {str(count): lambda count=count: measure(count) for count in urls}
        times = interleaved(measures, scale.repeats)
    long, short = (median(times[str(count)]) * 1e3 for count in (steps, _SHORT_STEPS))
    what = f"opening a run of {steps} steps and reading one, beyond the same of {_SHORT_STEPS}"
    objects = len(sizes_of(place, urls[steps]))
    mb = 1 << 20
    return [
        Row(f"{what}: requests", requests[steps] - requests[_SHORT_STEPS], at_most(3), "",
            f"{requests[steps]} and {requests[_SHORT_STEPS]}; {objects} objects"),
        Row(f"{what}: time", long - short, at_most(50), "ms", f"{long:.0f} ms and {short:.0f} ms"),
        Row(
            f"memory of a capturing process at step {steps} / at step {SETTLED_AT}",
            found["ended"] / found["settled"],
            at_most(1.02),
            "times",
            f"{found['ended'] / mb:.1f} MiB / {found['settled'] / mb:.1f} MiB;"
            f" {found['step_s'] * 1e6:.0f} us a step",
        ),
    ]  # fmt: skip
