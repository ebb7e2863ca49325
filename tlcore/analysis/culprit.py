"""The call that made a step's first NaN or infinity: its arguments are finite, and its result is not."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..layout.names import PathKey, call_name
from ..record import Json
from ..statistics.summary import Statistics

# Arguments of these names hold -inf on purpose, whatever else they hold.
_NAMES = ("mask", "bias", "alibi")


class Look(NamedTuple):
    """One tensor of the ``number``-th call of a module, in order of execution; ``harmless`` is a mask.

    How many ``nans`` and ``infs`` it holds is None where that is not known.
    """

    step: int
    call: Hashable
    module: str
    number: int
    direction: str
    nans: int | None
    infs: int | None
    harmless: bool = False


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first call whose inputs are finite and whose result is not."""

    step: int
    module: str
    call: int
    nans: int
    infs: int

    def __str__(self) -> str:
        counted = ((self.nans, "NaN"), (self.infs, "Inf"))
        what = " and ".join(f"{count} {name}" for count, name in counted if count)
        where = f"{call_name(self.module, self.call)} in step {self.step}"
        return f"NaN or Inf come from {where}: its inputs are finite, its outputs hold {what}"

    def to_json(self) -> Json:
        """A JSON object."""
        return {
            **{"step": self.step, "module": self.module, "call": self.call},
            **{"nans": self.nans, "infs": self.infs},
        }


def culprit(looks: Iterable[Look]) -> Culprit | None:
    """The first call, in order of return, with finite inputs and a result that is not; None without one.

    A call of whose inputs one is not known, or none was seen, is not accused.
    """
    finite: dict[Hashable, bool | None] = {}
    for look in looks:
        bad = None if look.nans is None or look.infs is None else bool(look.nans or look.infs)
        if look.direction == "inputs":
            known = finite.get(look.call, True)
            fine = look.harmless or (None if bad is None else not bad)
            finite[look.call] = False if False in (known, fine) else None if None in (known, fine) else True
        elif look.direction == "outputs" and bad and finite.get(look.call):
            return Culprit(look.step, look.module, look.number, look.nans or 0, look.infs or 0)
    return None


def may_be_mask(path: Iterable[PathKey], values: Statistics) -> bool:
    """Whether an argument with these statistics may be a mask: infinities beside zeros, or a mask's name."""
    if values.nans or not values.infs:
        return False
    if values.min is None or values.min == values.max == 0.0:
        return True
    named = any(name in str(key).lower() for key in path for name in _NAMES)
    return named and (values.max or 0.0) <= 0.0
