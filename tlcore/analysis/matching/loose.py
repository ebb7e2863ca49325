"""Tensors of runs with rows that have no row per token: compared whole or by sample, where that can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...layout.directions import is_operator
from ...layout.grids import Grid
from ...layout.unordered import is_sorted
from ...reader import Step
from ..results import Gap, TensorResult
from .pairs import Key, Located, Pair, Piece, absent

_Place = tuple[int, Key]


@dataclass(frozen=True, slots=True)
class _Batched:
    """A tensor of a batch's call: the batch, and each request's sample in it with its first position."""

    source: Located
    counted: Key
    grid: Grid
    samples: Mapping[str, tuple[int, int]]
    mask: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return _shape(self.source)

    @property
    def may_be_common(self) -> bool:
        """Whether it may be the same for all samples: it has their positions, and no axis of samples."""
        samples, length = self.grid.samples, self.grid.length
        whole = self.shape[0] not in {samples, samples * length} - {1}
        return whole and length in self.shape and not self.mask

    @property
    def by_sample(self) -> bool:
        """Whether the tensor may have one row for each sample, and nothing of positions."""
        rest = self.shape[1:]
        apart = self.shape[:1] == (self.grid.samples,) and not {self.grid.length, self.grid.keys} & {*rest}
        return apart and not self.mask

    def lies_as(self, other: _Batched) -> bool:
        """Whether the samples of its first axis, where it has one, are those of the other, in its order."""
        apart = self.shape[0] != self.grid.samples and not is_sorted(self.source.records[0])
        return apart or self.samples == other.samples


@dataclass(slots=True)
class Loose:
    """One run's tensors without known rows.

    Outside vLLM some have the same rows in the same places as those of the other run, and are compared whole;
    where no rows were known in a step's call at all, they have to be there in both. What is the same for all
    samples of a batch, such as the cosines of positions, is compared whole, and what has one row for each
    sample and no positions by sample, where the numbers of samples differ and leave no doubt.
    """

    names: dict[_Place, str] = field(default_factory=dict)
    sources: dict[_Place, tuple[Located, tuple[object, ...]]] = field(default_factory=dict)
    fitting: set[Key] = field(default_factory=set)
    unsure: set[Key] = field(default_factory=set)
    batched: dict[_Place, _Batched] = field(default_factory=dict)
    alone: dict[_Place, _Batched] = field(default_factory=dict)

    def add(
        self, step: Step, key: Key, counted: Key, source: Located, labels: Mapping[str, str], mask: bool
    ) -> None:
        """Take up a tensor; ``counted`` is its key with its call counted within the model's call."""
        place = (step.number, key)
        self.names[place] = source.names[0]
        if step.fits_rows(source.laid_out):
            self.fitting.add(counted)
        if step.rows is None:
            self.sources[place] = source, step.layout_of(source.records[0])
            batched = _batched(step, counted, source, labels, mask)
            if batched is not None:
                self.batched[place] = batched

    def add_rows(
        self, step: Step, key: Key, counted: Key, source: Located, labels: Mapping[str, str]
    ) -> None:
        """Take up a tensor with known rows: of a sample alone it may be what is common to all of a batch."""
        if step.rows is None and _shape(source)[:1] == (1,):
            batched = _batched(step, counted, source, labels)
            if batched is not None:
                self.alone[step.number, key] = batched

    def may_have(self, key: Key) -> bool:
        """Whether a tensor's rows may be there though its shape does not tell; it counts as not compared."""
        if key in self.fitting:
            self.unsure.add(key)
        return key in self.fitting


def _batched(
    step: Step, counted: Key, source: Located, labels: Mapping[str, str], mask: bool = False
) -> _Batched | None:
    found = step.batch_of(source.records[0])
    if found is None or not _shape(source):
        return None
    grid, rows = found
    samples = {}
    for row in rows:
        request = labels[str(row["request_id"])]
        if "sequence" in row:
            request = f"{request}@{row['sequence']}"
        samples[request] = row["first_row"] // grid.length, row.get("first_position") or 0
    return _Batched(source, counted, grid, samples, mask)


def pair_loose(a: Loose, b: Loose) -> tuple[list[Pair], list[TensorResult]]:
    """Pairs of tensors of one step, whole or by sample, and what only one run has of unknown calls."""
    pairs: list[Pair] = []
    missing: list[TensorResult] = []
    for side, (mine, theirs) in enumerate(((a, b), (b, a))):
        known = {key for _, key in theirs.names}
        for (step, key), (source, layout) in list(mine.sources.items()):
            other = theirs.sources.get((step, key))
            if other is None:
                # Code that the other run has not, whichever step it would be in.
                if not layout or (is_operator(key[3]) and key not in known):
                    missing.append(absent(key, source, side))
                continue
            same = layout == other[1] and (not layout or _shape(source) == _shape(other[0]))
            batched = a.batched.get((step, key)), b.batched.get((step, key))
            if batched[0] is not None and batched[1] is not None:
                same &= batched[0].lies_as(batched[1])
            if side == 0 and same:
                pairs.append(Pair(key, source, other[0]))
                del a.names[step, key], b.names[step, key]
    return [*pairs, *_pairs_of_batches(a, b)], missing


def _pairs_of_batches(a: Loose, b: Loose) -> list[Pair]:
    """The pairs of what is common to the samples of a batch, or has one row for each."""
    pairs = []
    for place in {**a.batched, **a.alone}:
        mine, theirs = (run.batched.get(place) or run.alone.get(place) for run in (a, b))
        loose = place in a.names or place in b.names
        if mine is None or theirs is None or not loose:
            continue
        pair = _pair_of_batches(place[1], mine, theirs)
        if pair is not None:
            pairs.append(pair)
            for run in (a, b):
                run.names.pop(place, None)
                run.unsure -= {mine.counted, theirs.counted}
    return pairs


def _pair_of_batches(key: Key, mine: _Batched, theirs: _Batched) -> Pair | None:
    grids = mine.grid, theirs.grid
    if mine.shape == theirs.shape and mine.may_be_common and theirs.may_be_common:
        return Pair(key, mine.source, theirs.source) if grids[0].length == grids[1].length else None
    by_sample = mine.by_sample and theirs.by_sample and grids[0].samples != grids[1].samples
    if not by_sample or mine.shape[1:] != theirs.shape[1:]:
        return None
    both = [request for request in mine.samples if request in theirs.samples]
    pieces = tuple((_row(request, mine), _row(request, theirs)) for request in both)
    return Pair(key, mine.source, theirs.source, pieces) if pieces else None


def _row(request: str, batched: _Batched) -> Piece:
    at, first = batched.samples[request]
    return Piece(request, (at, at + 1), first)


def _shape(source: Located) -> tuple[int, ...]:
    return tuple(source.records[0]["shape"])


def loose_notes(a: Loose, b: Loose) -> list[str]:
    """What to know of tensors that were not compared."""
    notes: list[str] = []
    names = [*a.names.values(), *b.names.values()]
    if names:
        shown = _shown(list(dict.fromkeys(names)))
        text = f"{len(names)} tensors have no row per token and were not compared, such as {shown}"
        notes.append(Gap(text))
    unsure = a.unsure | b.unsure
    if unsure:
        shown = _shown(sorted({key[1] or "_root" for key in unsure}))
        text = (
            f"{len(unsure)} tensors were not compared, as in one run their shape leaves open whose rows they"
        )
        notes.append(Gap(f"{text} have, of {shown}"))
    return notes


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3])
