"""The order of a data set's items: as they lie, or shuffled over all runs with bounded memory.

Items that lie together are a *group*, a few dozen groups a *window*. To shuffle, the groups of all runs are
shuffled, and then the items of each window: only a window is in memory, and it is read in large pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .tokens import Numbers

# A server takes twice the processor time for ranges half as large.
_GROUPS_IN_WINDOW = 32
_SMALLEST_GROUP = 64 << 10


class Plan(NamedTuple):
    """What an order depends on, beside the items: ``seed`` None leaves them as they lie."""

    seed: int | None
    epoch: int
    window_bytes: int


class Order:
    """Which item comes when. The same for equal plans, on every machine and with any numpy."""

    def __init__(self, count: int, row_bytes: int, rows: Numbers | None, plan: Plan) -> None:
        """``count`` items of one row each, or of as many as ``rows`` says."""
        self.plan = plan
        # What stays as it lies is read in large pieces however small its groups are.
        smallest = 0 if plan.seed is None else _SMALLEST_GROUP
        wanted = max(smallest, plan.window_bytes // _GROUPS_IN_WINDOW) // max(1, row_bytes)
        firsts, lasts, held = _groups(count, rows, max(1, wanted))
        if plan.seed is not None:
            chosen = _random(plan, 0).permutation(len(firsts))
            firsts, lasts, held = firsts[chosen], lasts[chosen], held[chosen]
        window = (np.cumsum(held) - 1).clip(0) // max(1, plan.window_bytes // max(1, row_bytes))
        self._windows = np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(firsts))
        self._firsts, self._lasts = firsts, lasts
        self._ends = np.cumsum(lasts - firsts)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self._windows) - 1

    def window_of(self, place: int) -> int:
        """The window of the item at a place of the order."""
        return int(self.windows_of(np.array([place]))[0])

    def windows_of(self, places: Numbers) -> Numbers:
        """The windows of the items at places of the order."""
        groups = np.searchsorted(self._ends, places, "right")
        found: Numbers = np.searchsorted(self._windows, groups, "right") - 1
        return found

    def bounds(self, window: int) -> tuple[int, int]:
        """The places ``[begin, end)`` of a window's items."""
        first, last = self._windows[window : window + 2]
        return (int(self._ends[first - 1]) if first else 0), int(self._ends[last - 1])

    def items(self, window: int) -> Numbers:
        """The items of a window, in their order."""
        first, last = self._windows[window : window + 2]
        groups = zip(self._firsts[first:last], self._lasts[first:last], strict=True)
        found = np.concatenate([np.arange(begin, end) for begin, end in groups])
        if self.plan.seed is None:
            return found
        return found[_random(self.plan, window + 1).permutation(len(found))]


def _groups(count: int, rows: Numbers | None, wanted: int) -> tuple[Numbers, Numbers, Numbers]:
    """The first item of each group, that behind its last, and how many rows it has."""
    if rows is None:
        firsts = np.arange(0, count, wanted)
        lasts = np.minimum(firsts + wanted, count)
        return firsts, lasts, lasts - firsts
    ends = np.cumsum(rows)
    # An item belongs to the group that its middle lies in.
    group = (ends - rows // 2 - 1).clip(0) // wanted
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    lasts = np.append(firsts[1:], count)
    return firsts, lasts, ends[lasts - 1] - ends[firsts] + rows[firsts]


def _random(plan: Plan, number: int) -> np.random.RandomState:
    """Its permutations never change with numpy's version; the newer generator's may."""
    assert plan.seed is not None
    words = [plan.seed & 0xFFFFFFFF, plan.seed >> 32 & 0xFFFFFFFF, plan.epoch, number]
    return np.random.RandomState(np.array(words, dtype=np.uint32))
