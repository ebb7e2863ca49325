"""Memory of large records that a segment keeps instead of copying it, until its file is stored."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from tlcore.layout.hashes import HASH_BYTES
from tlcore.protocols import Lease

from .blocks import Block
from .columns import Column, columns_of
from .plans import OpenStep, Plan

_NOTHING = np.empty(0, np.uint8)


class KeptMemory:
    """Leases, and the arrays that lie in their memory: ``nbytes`` together."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.nbytes = 0
        # Whoever has a part of one, a view of such a part included, holds the array.
        self._arrays: list[weakref.ref[np.ndarray]] = []

    def take(self, step: OpenStep) -> Mapping[int, np.ndarray] | None:
        """Take over what a step keeps; returns its arrays."""
        kept, leases, step.leases = step.kept, step.leases, []
        self.leases += leases
        self.nbytes += step.kept_bytes
        self._arrays += map(weakref.ref, (kept or {}).values())
        return kept

    def end(self, clean: bool = True) -> None:
        """Give all of it back; not ``clean`` where a client that was given up may still read."""
        clean = clean and all(array() is None for array in self._arrays)
        leases, self.leases, self.nbytes = self.leases, [], 0
        for lease in leases:
            lease.end(clean)


def columns_of_kept(
    plan: Plan, first: int, kept: Mapping[int, np.ndarray], numbers: Sequence[int], hashes: bytes
) -> dict[int, Column]:
    """Columns of a step's slots from ``first`` on, each of which lies in memory of its own."""
    # What an alias shares may lie in an earlier file; then its own array is never copied.
    data = [kept.get(original, _NOTHING) for original in plan.originals[first:]]
    block = Block.of_slots(plan.slots[first:], data, [0] * len(data), hashes[first * HASH_BYTES :])
    return columns_of(block, plan.slots[first:], numbers[first:])
