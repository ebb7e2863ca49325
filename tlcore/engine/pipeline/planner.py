"""What becomes of a batch: every name, text and count of it, worked out once for batches that are alike.

A model that decodes sends the same batch each step but for the bytes. A plan is all that can be said of
it without looking at them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ...layout.structure import Scalar
from ...layout.templates import Templates
from ...ledger import Counts
from ...record import Origin
from ..calls import CallSide
from ..filters.tensors import TensorSpec
from .describing import Described, count_specs, describe_side
from .resizing import differ_in_rows, resized

# A server's steps have as many tokens as ever again: about 50 MB, or so many however large the model is.
_MOST_TENSORS, _LEAST_REMEMBERED = 1 << 16, 8
# Shapes change from step to step in a busy server; these are some steps' worth of a large model's calls.
_MOST_SIDES = 1 << 14


class Planned(NamedTuple):
    """A tensor to be stored: its place in the batch, and its name without the step's directory."""

    place: int
    tail: str
    origin: Origin
    kind: int
    nbytes: int


class Texts(NamedTuple):
    """A batch's tensors to be stored, and its structure documents.

    ``bare`` are the names of the documents without a stored tensor; they come last, sorted, as for a reader
    who knows the order of the stored tensors only.
    """

    stored: tuple[Planned, ...]
    templates: Templates
    bare: frozenset[str]


class Plan:
    """What becomes of a batch: ``texts``, made when they are asked for, calls in order of entry, and ledger.

    ``places``, ``sizes``, ``kinds`` and ``rows`` (extents of the first dimension, 1 without one) are of the
    tensors to be stored, 64 bits each. ``base`` is another plan from which it differs in rows alone.
    """

    def __init__(
        self,
        make: Callable[[], Texts],
        columns: np.ndarray,
        calls: tuple[str, ...],
        counts: Counts,
        base: Plan | None = None,
    ) -> None:
        self._make = make
        self._columns = columns
        # Of all tensors, those, too, that are stored only once.
        self.nbytes = int(columns[1].sum())
        self.places, self.sizes, self.kinds, self.rows = (column.tobytes() for column in columns)
        self.calls = calls
        self.counts = counts
        self.base = base

    def __len__(self) -> int:
        return len(self._columns[0])

    def __bool__(self) -> bool:
        return True

    @cached_property
    def texts(self) -> Texts:
        """The tensors and documents."""
        return self._make()

    def resized(self, specs: Sequence[TensorSpec], make: Callable[[], Texts]) -> Plan:
        """The plan of a batch whose tensors, with ``specs``, `differ_in_rows` from those of this one."""
        counts = Counts(captured=len(specs), reasons=Counter())
        counts.bytes_captured = sum(spec.captured_bytes for spec in specs)
        # All of them are stored.
        return Plan(make, _columns(self._columns[0], specs), self.calls, counts, self)


class _Family(NamedTuple):
    """A plan, and the specs that it was made for."""

    specs: tuple[TensorSpec, ...]
    plan: Plan


class Planner:
    """The plans of the last few kinds of batches that a rank has sent."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: OrderedDict[Hashable, Plan] = OrderedDict()
        # Of batches that differ in their specs alone, the last that was planned by itself.
        self._families: OrderedDict[Hashable, _Family] = OrderedDict()
        self._tensors = 0
        self._sides: dict[Hashable, Described] = {}
        # Of each side what was described of it in full.
        self._kinds: dict[CallSide, tuple[tuple[TensorSpec, ...], str, Described]] = {}

    def plan(self, sides: Sequence[CallSide], specs: Sequence[TensorSpec], scalars: Sequence[Scalar]) -> Plan:
        """The plan of the batch with these sides, tensors and scalars."""
        # 1, 1.0 and True are equal, but not the same in JSON.
        own = tuple(specs)
        kind = tuple(sides), repr(scalars)
        key = kind, own
        plan = self._known.get(key)
        if plan is not None:
            self._known.move_to_end(key)
            return plan
        plan = self._known[key] = self._planned(kind, kind[0], own, tuple(scalars))
        self._tensors += len(plan)
        while self._tensors > _MOST_TENSORS and len(self._known) > _LEAST_REMEMBERED:
            self._tensors -= len(self._known.popitem(last=False)[1])
        return plan

    def _planned(
        self,
        kind: Hashable,
        sides: tuple[CallSide, ...],
        specs: tuple[TensorSpec, ...],
        scalars: tuple[Scalar, ...],
    ) -> Plan:
        family = self._families.get(kind)
        if family is not None and differ_in_rows(specs, family.specs):
            self._families.move_to_end(kind)
            return family.plan.resized(specs, partial(self._make, sides, specs, scalars))
        texts = self._make(sides, specs, scalars)
        calls = tuple(dict.fromkeys(side.directory for side in sides if side.begins))
        places = np.array([each.place for each in texts.stored], np.int64)
        columns = _columns(places, [specs[each.place] for each in texts.stored])
        plan = Plan(lambda: texts, columns, calls, count_specs(specs))
        self._families[kind] = _Family(specs, plan)
        if len(self._families) > _LEAST_REMEMBERED:
            self._families.popitem(last=False)
        return plan

    def _side(self, side: CallSide, specs: Sequence[TensorSpec], scalars: Sequence[Scalar]) -> Described:
        own, said = tuple(specs), repr(scalars) if scalars else ""
        key = (side, own, said)
        described = self._sides.get(key)
        if described is None:
            if len(self._sides) >= _MOST_SIDES:
                self._sides.clear()
            described = self._sides[key] = self._describe(side, own, said, scalars)
        return described

    def _describe(
        self, side: CallSide, specs: tuple[TensorSpec, ...], said: str, scalars: Sequence[Scalar]
    ) -> Described:
        known = self._kinds.get(side)
        if known is not None and known[1] == said and differ_in_rows(specs, known[0]):
            return resized(known[2], side, specs, scalars, self._rank)
        if len(self._kinds) >= _MOST_SIDES:
            self._kinds.clear()
        described = describe_side(side, specs, scalars, self._rank)
        self._kinds[side] = specs, said, described
        return described

    def _make(
        self, sides: Sequence[CallSide], specs: Sequence[TensorSpec], scalars: Sequence[Scalar]
    ) -> Texts:
        stored: list[Planned] = []
        filled: set[str] = set()
        templates = Templates()
        place = scalar = 0
        for side in sides:
            own = specs[place : place + side.tensors]
            described = self._side(side, own, scalars[scalar : scalar + side.scalars])
            if described.stored:
                filled.add(side.file)
            for index, tail, origin, kind in described.stored:
                stored.append(Planned(place + index, tail, origin, kind, own[index].nbytes))
            templates[side.file] = described.template
            place, scalar = place + side.tensors, scalar + side.scalars
        bare = frozenset(templates.keys() - filled)
        return Texts(tuple(stored), with_bare_last(templates, bare), bare)


def _columns(places: np.ndarray, specs: Sequence[TensorSpec]) -> np.ndarray:
    """Places, sizes, kinds and rows of tensors that are stored, as ``[4, n]``."""
    told = [
        [spec.nbytes for spec in specs],
        [spec.kind for spec in specs],
        [spec.shape[0] if spec.shape else 1 for spec in specs],
    ]
    return np.concatenate([places[None], np.array(told, np.int64)])


def with_bare_last(templates: Templates, bare: Collection[str]) -> Templates:
    """The templates, those named in ``bare`` sorted behind all others."""
    if not bare:
        return templates
    first = {name: template for name, template in templates.items() if name not in bare}
    return Templates(first | {name: templates[name] for name in sorted(bare)})
