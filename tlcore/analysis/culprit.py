"""The call that made a step's first NaN or infinity: its arguments are finite, and its result is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..layout.names import PathKey, call_name
from ..record import Json
from ..statistics.summary import Statistics

# Arguments of these names hold -inf on purpose, whatever else they hold.
_NAMES = ("mask", "bias", "alibi")


class Look(NamedTuple):
    """One tensor of the ``number``-th call of a module, in order of execution; ``harmless`` is a mask.

    ``call`` tells calls apart, but for the rank. How many ``nans`` and ``infs`` it holds is None where that
    is not known.
    """

    step: int
    rank: int
    call: Hashable
    module: str
    number: int
    direction: str
    nans: int | None
    infs: int | None
    harmless: bool = False

    @property
    def bad(self) -> bool | None:
        """Whether it holds any; None where that is not known."""
        return None if self.nans is None or self.infs is None else bool(self.nans or self.infs)


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first call whose inputs are finite, on every rank, and whose result is not.

    ``ranks`` are those on which that call made some. ``further`` is how many other calls of the run hold
    some in their results from there on, ``reached`` on which ranks, ``steps`` in which steps, with its own.
    """

    step: int
    module: str
    call: int
    nans: int
    infs: int
    ranks: tuple[int, ...] = (0,)
    further: int = 0
    reached: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = ()

    def __str__(self) -> str:
        counted = ((self.nans, "NaN"), (self.infs, "Inf"))
        what = " and ".join(f"{count} {name}" for count, name in counted if count)
        several = self.ranks != (0,) or self.reached != (0,)
        on = f" on {_ranks(self.ranks)}" if several else ""
        where = f"{call_name(self.module, self.call)}{on} in step {self.step}"
        made = f"NaN or Inf come from {where}: its inputs are finite, its outputs hold {what}"
        return made + self._reach(several)

    def _reach(self, several: bool) -> str:
        """How far they went, where they went anywhere."""
        if not self.further:
            return ""
        calls = "1 further call" if self.further == 1 else f"{self.further} further calls"
        on = f", on {_ranks(self.reached)}" if several else ""
        last = f", in {len(self.steps)} steps to {self.steps[-1]}" if len(self.steps) > 1 else ""
        return f"; then in {calls}{on}{last}"

    def to_json(self) -> Json:
        """A JSON object."""
        return {
            **{"step": self.step, "module": self.module, "call": self.call},
            **{"nans": self.nans, "infs": self.infs, "ranks": list(self.ranks)},
            **{"further": self.further, "reached": list(self.reached), "steps": list(self.steps)},
        }


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def culprit(looks: Iterable[Look]) -> Culprit | None:
    """The first call, in order of return, with finite inputs and a result that is not; None without one.

    A call of whose inputs one is not known, or none was seen, is not accused. Nor is one that another rank
    entered with NaN or infinities: a collective within it brings them from there. Ranks are looked at side
    by side: of calls that may be it, the one counts that its own rank made earliest.
    """
    seen = list(looks)
    finite: dict[tuple[int, Hashable], bool | None] = {}
    places: Counter[int] = Counter()
    found: list[tuple[tuple[int, int], Look]] = []
    for look in seen:
        own = look.rank, look.call
        places[look.rank] += 1
        if look.direction == "inputs":
            known = finite.get(own, True)
            fine = look.harmless or (None if look.bad is None else not look.bad)
            finite[own] = False if False in (known, fine) else None if None in (known, fine) else True
        elif look.direction == "outputs" and look.bad and finite.get(own):
            found.append(((look.step, places[look.rank]), look))
    entered = {call for (_, call), fine in finite.items() if fine is False}
    made = [(place, look) for place, look in found if look.call not in entered]
    if not made:
        return None
    _, first = min(made, key=lambda each: each[0])
    return _reached(first, [look for _, look in made], seen)


def _reached(first: Look, made: Sequence[Look], seen: Sequence[Look]) -> Culprit:
    """The culprit, with how far what it made went: calls of its and later steps whose results hold some."""
    begun: set[int] = set()
    calls: dict[tuple[int, Hashable], Look] = {}
    for look in seen:
        if look.call == first.call and look.direction == "outputs":
            begun.add(look.rank)
        # Of other ranks it is not known what came earlier in the step.
        later = look.step > first.step or (
            look.step == first.step and (look.rank != first.rank or bool(begun))
        )
        if later and look.direction == "outputs" and look.bad:
            calls.setdefault((look.rank, look.call), look)
    return Culprit(
        first.step,
        first.module,
        first.number,
        first.nans or 0,
        first.infs or 0,
        tuple(sorted({look.rank for look in made if look.call == first.call})),
        sum(look.call != first.call for look in calls.values()),
        tuple(sorted({look.rank for look in calls.values()})),
        tuple(sorted({look.step for look in calls.values()})),
    )


def may_be_mask(path: Iterable[PathKey], values: Statistics) -> bool:
    """Whether an argument with these statistics may be a mask: infinities beside zeros, or a mask's name."""
    if values.nans or not values.infs:
        return False
    if values.min is None or values.min == values.max == 0.0:
        return True
    named = any(name in str(key).lower() for key in path for name in _NAMES)
    return named and (values.max or 0.0) <= 0.0
