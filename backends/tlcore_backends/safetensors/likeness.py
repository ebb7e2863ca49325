"""Which steps' calls, records and structures are alike, whichever index of a run has them."""

from __future__ import annotations

import hashlib
import marshal
import os
from typing import Any

from .array_places import PLACE_KEYS
from .index import SegmentIndex
from .kinds import form_of_values

# Of an array's entry, what decides where its bytes lie and which hashes they have, which is looked at itself.
_NOWHERE = dict.fromkeys(PLACE_KEYS)


class Likeness:
    """What a step has but for numbers, places and hashes: of equal ones, if one is sound, all are.

    Digests of it, which take long, are made only where steps of indexes with other tables are compared, or
    for a set. What has a digest holds no index: of a run that is looked at there may be very many.
    """

    def __init__(self, index: SegmentIndex, plan: Any, extents: Any, values: Any) -> None:
        self._index: SegmentIndex | None = index
        self._token = index.common.token
        self._pair = plan, extents
        self._values = values
        self._told = b""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Likeness):
            return NotImplemented
        if self._token is other._token and self._pair == other._pair:
            return form_of_values(self._values) == form_of_values(other._values)
        return self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @property
    def _digest(self) -> bytes:
        index = self._index
        if index is not None:
            plan, extents = self._pair
            try:
                form = form_of_values(self._values)
                self._told = _digest((_plan(index, plan), _rows(index, extents), form))
            except (ValueError, RecursionError):
                # It is nested deeper than what any capture writes: it is like no other.
                self._told = os.urandom(20)
            self._index = None
        return self._told


def _plan(index: SegmentIndex, number: Any) -> bytes:
    known = index.common.plan_digests.get(number)
    if known is None:
        plan, entries = index.plan(number), index.entries
        arrays, structures, calls = entries("arrays"), entries("structures"), entries("calls")
        # First as well as last: whichever of these keys an entry has, the others stand in the same order.
        its = [{**_NOWHERE, **arrays[each], **_NOWHERE} for each in plan.arrays]
        theirs = [structures[each] for each in plan.structures], [calls[each] for each in plan.calls]
        known = index.common.plan_digests[number] = _digest((its, plan.groups, *theirs))
    return known


def _rows(index: SegmentIndex, extents: Any) -> bytes:
    """A list may be long, and many kinds of steps have the same one."""
    known = index.common.extent_digests.get(extents)
    if known is None:
        known = index.common.extent_digests[extents] = _digest(index.table("extents", extents))
    return known


def _digest(value: Any) -> bytes:
    # Unlike equality, this tells 1 from 1.0 and from true; version 2 has no references.
    return hashlib.blake2b(marshal.dumps(value, 2), digest_size=20).digest()
