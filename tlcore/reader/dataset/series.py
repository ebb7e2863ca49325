"""Steps that follow one another and differ in numbers alone: taken together."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..outlines import OutlinedStep
from .kin import KinRows
from .tokens import Numbers

if TYPE_CHECKING:
    from ..run import Run

# So many steps are asked for at first, and twice as many each time that there were: where few follow one
# another, little is looked at in vain.
_FIRST_ASKED, _MOST_ASKED = 16, 4096


class KinSteps(NamedTuple):
    """Steps of one kind, and each rank's numbers ``[steps, numbers]``."""

    steps: Sequence[int]
    numbers: Mapping[int, Numbers]


class Series:
    """The steps of a run, of which some are ``done`` before it is their turn."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.numbers = run.steps
        self.done: set[int] = set()
        self._most = _FIRST_ASKED

    def of(self, step: OutlinedStep, known: KinRows) -> KinSteps:
        """A step and those behind it that have what is known of their kind; none where it has not itself."""
        try:
            steps, numbers = step.series(self._most if known.each_once else 0)
        except OverflowError:
            return KinSteps([], {})
        begin = bisect_left(self.numbers, step.number)
        there = self.numbers[begin : begin + len(steps)]
        count = 1
        while count < len(steps) and there[count : count + 1] == [steps[count]]:
            # Others' ranks are not those of this one.
            if self._run.step(steps[count]).ranks != step.ranks:
                break
            count += 1
        full = count > self._most
        self._most = min(2 * self._most, _MOST_ASKED) if full else _FIRST_ASKED
        count = known.of({rank: own[:count] for rank, own in numbers.items()})
        self.done.update(steps[1:count])
        return KinSteps(steps[:count], {rank: own[:count] for rank, own in numbers.items()})
