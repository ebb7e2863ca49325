"""Interleaved measurements: what is compared runs in turn, so that a slow minute slows all alike."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from statistics import median

# Runs once and returns the seconds that count, so that preparing and tidying up are left out.
Measure = Callable[[], float]
Times = dict[str, list[float]]
_DRAWS = 2000


def timed(call: Callable[[], object]) -> float:
    """Seconds that ``call`` takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(measures: Mapping[str, Measure], repeats: int, warm_up: int = 1) -> Times:
    """Each measure ``repeats`` times, in rounds; the first ``warm_up`` rounds are run and forgotten.

    Every round has another order, so that none always runs in the wake of the same other one; what one
    has written is on the disk before the next begins.
    """
    names = list(measures)
    times: Times = {name: [] for name in names}
    order = random.Random(0)
    for number in range(-warm_up, repeats):
        for name in order.sample(names, len(names)):
            os.sync()
            seconds = measures[name]()
            if number >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Times, upper: str, lower: str) -> float:
    """The median over rounds of one measure divided by another of the same round."""
    return median(a / b for a, b in zip(times[upper], times[lower], strict=True))


def interval(times: Times, upper: str, lower: str) -> tuple[float, float]:
    """The 95 % interval of `ratio`, by drawing the rounds again with replacement."""
    rounds = [a / b for a, b in zip(times[upper], times[lower], strict=True)]
    draw = random.Random(0)
    drawn = sorted(median(draw.choices(rounds, k=len(rounds))) for _ in range(_DRAWS))
    return drawn[round(0.025 * _DRAWS)], drawn[round(0.975 * _DRAWS) - 1]


def added(times: Times, name: str, base: str) -> float:
    """The median over rounds of the seconds that one measure takes longer than another."""
    return median(a - b for a, b in zip(times[name], times[base], strict=True))
