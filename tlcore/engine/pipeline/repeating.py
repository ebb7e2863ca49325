"""Steps that are like one before: written at once, without a record for each tensor.

A model that decodes sends the same batch each step but for the bytes, and in a busy server for the number of
rows. All that has to be found out then are hashes, and which tensors are equal, which the extension does in
one call.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from ...alike import AlikeStep, SupportsAlikeInCapture, SupportsWriteAlike, SupportsWriteResized
from ...hotpath.native import can_hash, extension
from ...layout.hashes import HASH_BYTES
from ...protocols import Sink, SupportsLateCommit
from ...record import StepSummary
from ..batch import Batch
from .planner import Plan

# As many as may be of a small model; a large one has fewer.
_MOST_PLANS = 64
_MOST_KINDS = 8
# A larger step is hashed while it is written, so that it comes once into the processor's caches.
_LARGE_BYTES = 64 << 20
_DIGITS = 2 * HASH_BYTES


class _Steps:
    """The last steps that the sink has of a plan, or of all that differ in rows alone.

    They are told by which of their tensors were equal.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[bytes, int] = OrderedDict()

    def get(self, firsts: bytes) -> int | None:
        return self._of.get(firsts)

    def learn(self, firsts: bytes, number: int) -> None:
        self._of[firsts] = number
        self._of.move_to_end(firsts)
        if len(self._of) > _MOST_KINDS:
            self._of.popitem(last=False)

    def forget(self, firsts: bytes) -> None:
        self._of.pop(firsts, None)


class Seen:
    """A plan, and the steps of it and of its ``family`` that the sink has."""

    def __init__(self, plan: Plan, family: _Steps) -> None:
        self.plan = plan
        self.own = _Steps()
        self.family = family
        self._nbytes: tuple[bytes, int] = b"", 0

    def nbytes(self, firsts: bytes) -> int:
        """Bytes of all tensors that are their own first ones; mostly the same are as in the last step."""
        if self._nbytes[0] != firsts:
            places, sizes = np.frombuffer(firsts, np.int64), np.frombuffer(self.plan.sizes, np.int64)
            self._nbytes = firsts, int(sizes[places == np.arange(len(places))].sum())
        return self._nbytes[1]


class Look(NamedTuple):
    """What a step's tensors are: their ``addresses``, ``hashes`` and which are equal (``firsts``)."""

    seen: Seen
    addresses: bytes
    hashes: bytes
    firsts: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are no aliases."""
        return self.seen.nbytes(self.firsts)

    def digests(self, first: int, count: int) -> list[str]:
        """The hashes of so many tensors from ``first`` on."""
        text = self.hashes[first * HASH_BYTES : (first + count) * HASH_BYTES].hex()
        return [text[begin : begin + _DIGITS] for begin in range(0, len(text), _DIGITS)]

    def fill(self, memory: memoryview) -> bool:
        """Put the bytes of all tensors that are no aliases into memory of that size."""
        extension.collect(memory, self.addresses, self.seen.plan.sizes, self.firsts)
        return True


class Repeats:
    """Knows the steps that others may be like, for a sink that can be told so."""

    def __init__(self, sink: Sink) -> None:
        self._sink: SupportsWriteAlike | None = None
        if can_hash and isinstance(sink, SupportsAlikeInCapture) and sink.alike_in_capture:
            self._sink = sink if isinstance(sink, SupportsLateCommit) else None
        self._resizing = self._sink if isinstance(self._sink, SupportsWriteResized) else None
        # Both hold the plans, so that no others get their ids.
        self._seen: OrderedDict[int, Seen] = OrderedDict()
        self._families: OrderedDict[int, tuple[Plan, _Steps]] = OrderedDict()

    def may_repeat(self, batch: Batch, plan: Plan) -> bool:
        """Whether a batch is a whole step that may be like one before, or others like it."""
        if self._sink is None or not batch.is_whole_step or not 0 < plan.nbytes <= _LARGE_BYTES:
            return False
        if id(plan) not in self._seen:
            if len(self._seen) >= _MOST_PLANS:
                self._seen.popitem(last=False)
            self._seen[id(plan)] = Seen(plan, self._family(plan))
        self._seen.move_to_end(id(plan))
        return True

    def _family(self, plan: Plan) -> _Steps:
        base = plan if plan.base is None else plan.base
        known = self._families.get(id(base))
        if known is None:
            if len(self._families) >= _MOST_KINDS:
                self._families.popitem(last=False)
            known = self._families[id(base)] = base, _Steps()
        self._families.move_to_end(id(base))
        return known[1]

    def look(self, batch: Batch, plan: Plan) -> Look | None:
        """Hash a batch of a plan that may repeat."""
        seen = self._seen.get(id(plan))
        if seen is None:
            return None
        found = extension.fingerprint(batch.chunks, batch.offsets, plan.places, plan.sizes, plan.kinds)
        return Look(seen, *found)

    def write(self, look: Look, summary: StepSummary) -> bool:
        """Write and commit a step; False, with nothing written, where none like it is known."""
        seen, firsts = look.seen, look.firsts
        if self._write_like(look, summary):
            return True
        if not self._write_resized(look, summary):
            return False
        # The sink knows this one, too.
        seen.own.learn(firsts, summary.step)
        seen.family.learn(firsts, summary.step)
        return True

    def _write_like(self, look: Look, summary: StepSummary) -> bool:
        like = look.seen.own.get(look.firsts)
        if like is None or self._sink is None:
            return False
        if self._sink.write_alike(_alike(look, like, summary), summary):
            return True
        look.seen.own.forget(look.firsts)
        return False

    def _write_resized(self, look: Look, summary: StepSummary) -> bool:
        like = look.seen.family.get(look.firsts)
        if like is None or self._resizing is None:
            return False
        if self._resizing.write_resized(_alike(look, like, summary), look.seen.plan.rows, summary):
            return True
        look.seen.family.forget(look.firsts)
        return False

    def knows(self, look: Look) -> bool:
        """Whether the sink may have a step like this one."""
        seen = look.seen
        if seen.own.get(look.firsts) is not None:
            return True
        return self._resizing is not None and seen.family.get(look.firsts) is not None

    def learn(self, look: Look, number: int) -> None:
        """The sink has accepted step ``number``, which is like none of those that it knew."""
        for steps in (look.seen.own, look.seen.family):
            steps.learn(look.firsts, number)


def _alike(look: Look, like: int, summary: StepSummary) -> AlikeStep:
    return AlikeStep(summary.step, like, {}, look.hashes, look.nbytes, look.fill)
