"""Steps that are like one before: written at once, without a record for each tensor.

A model that decodes sends the same batch each step but for the bytes. All that has to be found out then are
hashes, and which tensors are equal, which the extension does in one call.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from ...alike import AlikeStep, SupportsAlikeInCapture, SupportsWriteAlike
from ...hotpath.native import can_hash, extension
from ...protocols import Sink, SupportsLateCommit
from ...record import StepSummary
from ..batch import Batch
from .planner import Plan

# As many as may be of a small model; a large one has fewer.
_MOST_PLANS = 64
_MOST_KINDS = 8
# Of a plan whose tensors are equal in ever other ways, all would be hashed twice.
_MOST_MISSED = 4


class Seen:
    """A plan, and the steps of it that the sink has, by which of their tensors were equal."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        numbers = np.array([(each.place, each.nbytes, each.kind) for each in plan.stored], np.int64)
        self.places, self.sizes, self.kinds = (column.tobytes() for column in numbers.T)
        self.like: dict[bytes, int] = {}
        self.missed = 0


class Look(NamedTuple):
    """What a step's tensors are: their ``addresses``, ``hashes`` and which are equal (``firsts``)."""

    seen: Seen
    addresses: bytes
    hashes: bytes
    firsts: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are no aliases."""
        firsts, sizes = np.frombuffer(self.firsts, np.int64), np.frombuffer(self.seen.sizes, np.int64)
        return int(sizes[firsts == np.arange(len(firsts))].sum())

    def fill(self, memory: memoryview) -> bool:
        """Put the bytes of all tensors that are no aliases into memory of that size."""
        extension.collect(memory, self.addresses, self.seen.sizes, self.firsts)
        return True


class Repeats:
    """Knows the steps that others may be like, for a sink that can be told so."""

    def __init__(self, sink: Sink) -> None:
        self._sink: SupportsWriteAlike | None = None
        if can_hash and isinstance(sink, SupportsAlikeInCapture) and sink.alike_in_capture:
            self._sink = sink if isinstance(sink, SupportsLateCommit) else None
        self._seen: OrderedDict[int, Seen] = OrderedDict()

    def may_repeat(self, batch: Batch, plan: Plan) -> bool:
        """Whether a batch is a whole step of a plan that was seen before; it is from now on."""
        if self._sink is None or not batch.is_whole_step or not plan.stored:
            return False
        seen = self._seen.get(id(plan))
        if seen is not None:
            self._seen.move_to_end(id(plan))
            return seen.missed < _MOST_MISSED
        if len(self._seen) >= _MOST_PLANS:
            self._seen.popitem(last=False)
        # Holds the plan, so that no other gets its id.
        self._seen[id(plan)] = Seen(plan)
        return False

    def look(self, batch: Batch, plan: Plan) -> Look | None:
        """Hash a batch of a plan that may repeat."""
        seen = self._seen.get(id(plan))
        if seen is None:
            return None
        found = extension.fingerprint(batch.chunks, batch.offsets, seen.places, seen.sizes, seen.kinds)
        return Look(seen, *found)

    def write(self, look: Look, summary: StepSummary) -> bool:
        """Write and commit a step; False, with nothing written, where none like it is known."""
        like = look.seen.like.get(look.firsts)
        if like is None or self._sink is None:
            return False
        step = AlikeStep(summary.step, like, {}, look.hashes, look.nbytes, look.fill)
        written = self._sink.write_alike(step, summary)
        if written:
            look.seen.missed = 0
        else:
            del look.seen.like[look.firsts]
        return written

    def knows(self, look: Look) -> bool:
        """Whether the sink may have a step like this one."""
        return look.firsts in look.seen.like

    def learn(self, look: Look, number: int) -> None:
        """The sink has accepted step ``number``, which is like none of those that it knew."""
        look.seen.missed += 1
        if len(look.seen.like) >= _MOST_KINDS:
            look.seen.like.clear()
        look.seen.like[look.firsts] = number
