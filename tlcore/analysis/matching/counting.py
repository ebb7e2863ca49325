"""Which step of one run is which of the other: by their numbers, or in order where tools count otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...layout.run_files import COUNTS_FROM
from ...reader import Run, Step
from ..results import Gap
from .rules import Rules

_SHOWN = 4


def counted_alike(
    a: Run, b: Run, rules: Rules, steps: tuple[Sequence[Step], Sequence[Step]]
) -> tuple[Rules, list[str]]:
    """The rules for two runs without rows, and what to know of how their steps are counted.

    Another tool may count from where its job began, or training iterations: where no number is in both runs,
    and there are as many, steps are paired in order. One that always counts from 1 says so.
    """
    numbers = [[step.number for step in each] for each in steps]
    first = [int(run.document.get(COUNTS_FROM, 0)) if run.is_foreign else 0 for run in (a, b)]
    if first[0] != first[1]:
        text = f"steps are counted from {first[0]} in A and from {first[1]} in B, and paired by that"
        return replace(rules, same_step=tuple((each, each - first[1] + first[0]) for each in numbers[1])), [
            text
        ]
    if not (a.is_foreign or b.is_foreign) or not all(numbers) or set(numbers[0]) & set(numbers[1]):
        return rules, []
    if len(numbers[0]) == len(numbers[1]):
        shown = [_shown(each) for each in numbers]
        text = f"A's steps {shown[0]} are held against B's {shown[1]}, in order: no number is in both"
        return replace(rules, same_step=tuple(zip(*reversed(numbers), strict=True))), [text]
    return rules, [Gap(none_in_common(*numbers))]


def none_in_common(a: Sequence[int], b: Sequence[int]) -> str:
    """What to know of two runs of which no step has the other's number."""
    text = f"A has steps {_shown(a)}, B has {_shown(b)}, so none is in both"
    return f"{text}; of another tool's dump, as many of each, chosen by --steps, are compared in order"


def _shown(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return shown if len(numbers) <= _SHOWN else f"{shown}, ... {numbers[-1]}"
