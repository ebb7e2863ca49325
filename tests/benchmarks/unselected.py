"""A step that is not selected, against a model without tlcore."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tlcore.engine.capture import capture

from .rows import Row, Scale, at_most
from .timing import Times, interleaved, ratio, timed
from .workload import Workload, workload

_NEVER = 10**9


def table(scale: Scale) -> list[Row]:
    """The ratio for a prefill and for a decode step, whose overhead shows more."""
    kinds: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
    return [_row(kind, scale) for kind in kinds]


def _row(kind: Literal["prefill", "decode"], scale: Scale) -> Row:
    work = workload(kind, scale)
    with _quiet(), tempfile.TemporaryDirectory(prefix="tlcore-bench-") as directory:
        times: Times = interleaved(
            {
                "plain": lambda: timed(work.forward),
                "uncaptured": lambda: _uncaptured(work, directory),
                "plain again": lambda: timed(work.forward),
            },
            scale.pairs if kind == "prefill" else 4 * scale.pairs,
        )
    uncaptured, null = ratio(times, "uncaptured", "plain"), ratio(times, "plain again", "plain")
    return Row(
        f"a step that is not selected / no tlcore, over the null ratio, {kind}",
        uncaptured / null,
        at_most(1.01),
        "",
        f"uncaptured/plain {uncaptured:.4f}, null (plain/plain) {null:.4f}",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """That no step came is what is measured, and need not be said."""
    log = logging.getLogger("tlcore")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _uncaptured(work: Workload, directory: str) -> float:
    with capture(work.model, output_dir=directory, log_step_ids=[_NEVER]):
        # What begins a capture has looked at every weight: the first step finds the processor's caches cold.
        work.forward()
        return timed(work.forward)
