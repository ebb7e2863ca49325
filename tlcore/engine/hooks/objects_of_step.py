"""What a step's calls take or return that is not looked into: counted once a step, whoever hands it on."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...hotpath import objects
from ...hotpath.held_tensors import tensors_in
from ...ledger import Counts
from ..filters.tensors import TensorSpecs

# Tensors of one object that are counted, at most.
_MOST_TENSORS = 10_000
Reference = Callable[[], Any]
# What most steps count; nobody adds to it.
_NONE = Counts()


class ObjectsOfStep:
    """The objects of one step, each known by its identity while it lives."""

    def __init__(self, specs: TensorSpecs) -> None:
        self._specs = specs
        self._known: dict[int, tuple[Reference, str, Counts]] = {}
        self._taken: dict[int, tuple[Reference, int | None]] = {}
        self._gone = Counts()

    def add(self, value: Any, reason: str) -> None:
        """An object that is not looked into. A cache or module counts its tensors, all else as one."""
        known = self._known.get(id(value))
        if known is not None:
            if known[0]() is value:
                return
            self._gone.add(known[2])
        self._known[id(value)] = _reference(value), reason, self._count(value, reason)

    def first(self, tensor: torch.Tensor, again: bool) -> bool:
        """Whether a tensor was not met in this step, or may have been written to since.

        Where torch does not tell (inference mode), that may be so wherever it is met ``again`` in a result.
        """
        version = None if tensor.is_inference() else tensor._version
        known = self._taken.get(id(tensor))
        same = known is not None and known[0]() is tensor and version == known[1]
        if same and not (version is None and again):
            return False
        self._taken[id(tensor)] = weakref.ref(tensor), version
        return True

    def counted(self) -> Counts:
        """The ledger of the step's objects; what a cache holds now counts, where that is more than before."""
        self._taken.clear()
        if not self._known:
            return _NONE
        total, self._gone = self._gone, Counts()
        for reference, reason, counts in self._known.values():
            value = reference()
            now = self._count(value, reason) if value is not None and reason == objects.CACHE else counts
            total.add(max(counts, now, key=lambda each: each.captured))
        self._known.clear()
        return total

    def _count(self, value: Any, reason: str) -> Counts:
        if reason not in (objects.CACHE, objects.MODULE):
            return Counts(captured=1, skipped=1, reasons=Counter({f"skipped: {reason}": 1}))
        counts = Counts()
        for tensor in _tensors(value):
            spec = self._specs.find(tensor)
            if spec.outcome is None or spec.outcome.column is not None:
                counts.captured += 1
                counts.bytes_captured += spec.nbytes
        counts.skipped = counts.captured
        if counts.captured:
            counts.reasons[f"skipped: {reason}"] = counts.captured
        return counts


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    else:
        yield from tensors_in(value, _MOST_TENSORS)


def _reference(value: Any) -> Reference:
    try:
        return weakref.ref(value)
    except TypeError:
        # Seldom, and only until the step ends.
        return lambda: value
