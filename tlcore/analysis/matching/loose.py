"""Tensors of runs with rows in which nobody knows a request's rows: compared whole, where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...reader import Step
from ..results import TensorResult
from .pairs import Key, Located, Pair, absent

_Place = tuple[int, Key]


@dataclass(slots=True)
class Loose:
    """One run's tensors without known rows.

    Outside vLLM some have the same rows in the same places as those of the other run, and are compared whole;
    where no rows were known in a step's call at all, they have to be there in both.
    """

    names: dict[_Place, str] = field(default_factory=dict)
    sources: dict[_Place, tuple[Located, tuple[object, ...]]] = field(default_factory=dict)
    fitting: set[Key] = field(default_factory=set)
    unsure: set[Key] = field(default_factory=set)

    def add(self, step: Step, key: Key, counted: Key, source: Located) -> None:
        """Take up a tensor; ``counted`` is its key with its call counted within the model's call."""
        place = (step.number, key)
        self.names[place] = source.names[0]
        if step.rows is None:
            self.sources[place] = source, step.layout_of(source.records[0])
            if step.fits_rows(source.records[0]):
                self.fitting.add(counted)

    def may_have(self, key: Key) -> bool:
        """Whether a tensor's rows may be there though its shape does not tell; it counts as not compared."""
        if key in self.fitting:
            self.unsure.add(key)
        return key in self.fitting


def pair_loose(a: Loose, b: Loose) -> tuple[list[Pair], list[TensorResult]]:
    """Pairs of whole tensors of one step with the same layout, and what only one run has of unknown calls."""
    pairs: list[Pair] = []
    missing: list[TensorResult] = []
    for side, (mine, theirs) in enumerate(((a, b), (b, a))):
        for (step, key), (source, layout) in list(mine.sources.items()):
            other = theirs.sources.get((step, key))
            if other is None:
                if not layout:
                    missing.append(absent(key, source, side))
                continue
            same = layout == other[1]
            if side == 0 and same and (not layout or _shape(source) == _shape(other[0])):
                pairs.append(Pair(key, source, other[0]))
                del a.names[step, key], b.names[step, key]
    return pairs, missing


def _shape(source: Located) -> tuple[int, ...]:
    return tuple(source.records[0]["shape"])


def loose_notes(a: Loose, b: Loose) -> list[str]:
    """What to know of tensors that were not compared."""
    notes = []
    names = [*a.names.values(), *b.names.values()]
    if names:
        text = f"{len(names)} tensors have no row per token and were not compared, such as {_shown(names)}"
        notes.append(text)
    unsure = a.unsure | b.unsure
    if unsure:
        shown = _shown(sorted({key[1] or "_root" for key in unsure}))
        text = (
            f"{len(unsure)} tensors were not compared, as in one run their shape leaves open whose rows they"
        )
        notes.append(f"{text} have, of {shown}")
    return notes


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3])
