"""Which steps' calls, records and structures are alike, whichever index of a run has them."""

from __future__ import annotations

import hashlib
import marshal
from typing import Any

from .array_places import PLACE_KEYS
from .index import SegmentIndex
from .kinds import form_of_values

# Of an array's entry, what decides where its bytes lie and which hashes they have, which is looked at itself.
_NOWHERE = dict.fromkeys(PLACE_KEYS)


class Likeness:
    """Digests of what an index's steps have, but for numbers, places and hashes: if one is sound, all are."""

    def __init__(self, index: SegmentIndex) -> None:
        self._index = index
        self._plans: dict[Any, bytes] = {}
        self._extents: dict[Any, bytes] = {}

    def of(self, plan: Any, extents: Any, values: Any) -> bytes | None:
        """That of a step; None where it cannot be told. Raises ReadError for what makes no sense."""
        try:
            return _digest((self._plan(plan), self._rows(extents), form_of_values(values)))
        except (ValueError, RecursionError):
            # It is nested deeper than what any capture writes.
            return None

    def _plan(self, number: Any) -> bytes:
        known = self._plans.get(number)
        if known is None:
            plan, entries = self._index.plan(number), self._index.entries
            arrays, structures, calls = entries("arrays"), entries("structures"), entries("calls")
            # First as well as last: whichever of these keys an entry has, the others stand in the same order.
            its = [{**_NOWHERE, **arrays[each], **_NOWHERE} for each in plan.arrays]
            theirs = [structures[each] for each in plan.structures], [calls[each] for each in plan.calls]
            known = self._plans[number] = _digest((its, plan.groups, *theirs))
        return known

    def _rows(self, extents: Any) -> bytes:
        """A list may be long, and many kinds of steps have the same one."""
        known = self._extents.get(extents)
        if known is None:
            known = self._extents[extents] = _digest(self._index.table("extents", extents))
        return known


def _digest(value: Any) -> bytes:
    # Unlike equality, this tells 1 from 1.0 and from true; version 2 has no references.
    return hashlib.blake2b(marshal.dumps(value, 2), digest_size=20).digest()
