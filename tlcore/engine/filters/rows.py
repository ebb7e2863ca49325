"""Whose rows the tensors of the running step's calls have, told by whoever runs it, and which are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...layout.grids import as_rows, grid_entry
from ...layout.rows import ITEM_TOKENS, NO_ROWS, BeforeRows, Placed, Row, RowSet, Span, placed
from ...layout.unordered import is_nobodys, is_sorted_amid
from ...layout.windows import Window
from ...record import Json
from .choosing import Chooses, Choosing
from .kept_rows import KeptRows

# A call's directory, its module's name, and which call of it in the step it is.
Begun = tuple[str, str, int]


class Given(NamedTuple):
    """What a model is given of one request in a step.

    ``row`` is its entry in ``step.json``, ``tokens`` are the ids of these rows, ``prompt`` is its prompt's
    length. It is ``apart`` where no request shares a prefix cache with it.
    """

    row: Row
    tokens: Sequence[int]
    prompt: int | None
    apart: bool


@dataclass
class _Part:
    """Calls of a step, one after the other, whose tensors have the same row sets.

    ``first`` says of modules how often they had been called when the call of the model began that these
    calls are part of. ``whole`` are shapes of tensors of which all rows were kept, as nobody knows whose
    they are. ``left_out`` are requests that have chosen other modules than those of these calls. ``narrower``
    are parts with the same row sets, of which others are left out or the positions are not known, or with
    none; they lie ``aside``.
    """

    sets: tuple[RowSet, ...]
    first: Mapping[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    kept: dict[int, KeptRows] = field(default_factory=dict)
    whole: set[tuple[int, ...]] = field(default_factory=set)
    left_out: frozenset[str] = frozenset()
    narrower: dict[tuple[frozenset[str], bool, bool], _Part] = field(default_factory=dict)
    aside: bool = False
    # Whether a call's number within the model's call is another than within the step.
    renumbers: bool = False

    def leaves_doubt(self, kept: int) -> bool:
        """Whether the number of rows alone does not tell whose they are, where so many were kept."""
        # Of these some may have to go, and nobody knows how many.
        least = 0 if any(each.waits for each in self.kept.values()) else kept
        whole = any(least <= shape[0] <= kept for shape in self.whole if shape)
        return whole or any(each.single for each in self.sets)

    @functools.cached_property
    def of_items(self) -> bool:
        """Whether rows are said to be those of the tokens that stand for items."""
        return any(each.kind == ITEM_TOKENS for each in self.sets)


class StepRows:
    """The row sets of a step's calls, as they come to be known while it runs.

    ``chooses``, ``last`` and ``window`` are those of `Choosing`, and go for every step for which nothing else
    is said. Rows of drafts of which a request may keep none are kept, and ``undecided``, until it is known.
    ``first`` says how often which module was called in
    the step before the model's call that runs now, where a step has several. ``before`` is how long axes of
    whole numbers before that of rows may be, as far as it is known. ``prompts`` has the length of
    each request's prompt, by its id and sequence, as far as it is known. ``inner`` says of a module whether
    it lies within an encoder, which may put the tokens of an item into another order.
    """

    def __init__(
        self, chooses: Chooses | None = None, last: bool = False, window: Window | None = None
    ) -> None:
        # What goes for every step.
        self.usual = self._choosing = Choosing(chooses, last, window)
        self.prompts: Mapping[tuple[str, str], int] = {}
        self.before: BeforeRows = None
        self.inner: Callable[[str], bool] | None = None
        self.calls_begun: Callable[[], Sequence[Begun]] = list
        self.counts: Callable[[], Mapping[str, int]] = dict
        self._begin(None)

    def begin_step(self, choosing: Choosing | None = None) -> None:
        """Forget the step before; nothing is known yet of the rows of this one."""
        known = self.told or self._main is not None or len(self._parts) != 1 or self.undecided
        part = self._part
        untouched = not (known or part.calls or part.kept or part.whole) and self._choosing is self.usual
        if choosing is not None or not untouched:
            self._begin(choosing)

    def _begin(self, choosing: Choosing | None) -> None:
        self._choosing = choosing or self.usual
        self._module, self._sorted = "", False
        self.first: Mapping[str, int] = {}
        self._main: _Part | None = None
        self._part = _Part(NO_ROWS, self.first)
        self._parts = [self._part]
        self._everyone = self.chooses is None
        self.told = False
        self._unsampled: Container[str] = ()
        # Along which axis the positions lay of the tensor that was cut last; None where it was left whole.
        self.cut_along: int | None = None
        # The rows of that tensor where some may have to go, and all such rows of the step.
        self.waiting: KeptRows | None = None
        self.undecided: list[KeptRows] = []

    @property
    def chooses(self) -> Chooses | None:
        """Whether a request's rows are stored, by its id; None where every request's are."""
        return self._choosing.chooses

    def hears(self, module: str, amid: str = "") -> bool:
        """Note whose tensors come now; whether any of their rows may be kept.

        ``amid`` is the direction of what a call shows in the midst of it.
        """
        self._module, self._sorted = module, bool(amid) and is_sorted_amid(module, amid)
        return self._choosing.hears(module)

    @property
    def sets(self) -> tuple[RowSet, ...]:
        """The row sets of the calls that begin now."""
        return self._part.sets

    def batch(
        self,
        requests: Sequence[str],
        prompts: Mapping[tuple[str, str], int] | None = None,
        unsampled: Container[str] = (),
    ) -> None:
        """Say which requests the step runs, and of which it samples no token, as in the midst of a prompt.

        Where all of them are chosen, every tensor may be stored.
        """
        self.told = True
        self._unsampled = unsampled
        if prompts is not None:
            self.prompts = prompts
        self._everyone = self.chooses is None or all(map(self.chooses, requests))

    def enter(self, sets: Sequence[RowSet], main: bool = False) -> None:
        """From now on calls have these row sets. ``main`` ones are those of the step, and named once."""
        self.note()
        if main and self._main is None:
            self._main = self._part = _Part(tuple(sets), self.first)
            return
        for part in (self._main, *self._parts):
            # Those from before an interruption go on.
            if part is None or part.aside:
                continue
            if part.sets is sets and part.first is self.first:
                self._part = part
                return
        self._part = _Part(tuple(sets), self.first)
        self._parts.append(self._part)

    def count_anew(self, begin: int = 0) -> None:
        """The next call of each module counts as its ``begin``-th from now on, until ``first`` is set."""
        self.note()
        if any(part is not None and part.calls for part in (self._main, *self._parts)):
            self.first = {name: count - begin for name, count in self.counts().items() if count != begin}

    def resume_main(self) -> None:
        """Go on with the row sets of the step itself, for what is told after its end."""
        if self._main is not None:
            self.first = self._main.first
            self.enter(self._main.sets)

    def note(self) -> None:
        """Remember which calls began since the row sets were entered."""
        for directory, module, call in self.calls_begun():
            part = self._part_of(module)
            before = part.first.get(module, 0)
            part.calls.append(directory)
            part.indices.append(call - before)
            part.renumbers |= before != 0

    def _part_of(self, module: str) -> _Part:
        """The part that the calls of a module belong to now."""
        part, left_out = self._part, self._choosing.left_out(module)
        nobodys = is_nobodys(module)
        inner = nobodys or (part.of_items and self.inner is not None and self.inner(module))
        if not (left_out or inner):
            return part
        found = part.narrower.get((left_out, inner, nobodys))
        if found is None:
            sets = () if nobodys else tuple(map(_in_some_order, part.sets)) if inner else part.sets
            found = _Part(sets, part.first, left_out=left_out, aside=True)
            part.narrower[left_out, inner, nobodys] = found
            self._parts.append(found)
        return found

    def cut(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's rows that are kept, the tensor itself where all are; None if it must not be stored."""
        self.cut_along = self.waiting = None
        part = self._part_of(self._module)
        found = self._placed(tensor, () if self._sorted else part.sets)
        if found.rows is not None:
            self.cut_along = found.axis
            kept = self._kept(part, found.rows)
            self.waiting = kept if kept.waits else None
            return kept.of(as_rows(tensor, found.axis))
        if not (self._everyone and self.told) or part.left_out:
            return None
        part.whole.add(tuple(tensor.shape))
        return tensor

    def placed(self, tensor: torch.Tensor) -> Placed:
        """Whose the rows are of a tensor of the calls that run now, and along which axis they lie."""
        return self._placed(tensor, self._part.sets)

    def _placed(self, tensor: torch.Tensor, sets: Sequence[RowSet]) -> Placed:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not (plain and self.told):
            return Placed(None, 0, False)
        whole_numbers = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        return placed(tensor.shape, whole_numbers, sets, self.before)

    def _kept(self, part: _Part, rows: RowSet) -> KeptRows:
        kept = part.kept.get(id(rows))
        if kept is None:
            chosen = functools.partial(self._chosen_of, part.left_out)
            kept = KeptRows(rows, chosen, self._choosing.lasts, self._choosing.only_sure)
            part.kept[id(rows)] = kept
            if kept.waits:
                self.undecided.append(kept)
        return kept

    def _chosen_of(self, left_out: frozenset[str], span: Span) -> tuple[int, int] | None:
        """Which rows of a span are kept: the first, and how many."""
        request, choosing = str(span.row["request_id"]), self._choosing
        if request in left_out or not choosing.keeps(request):
            return None
        if not choosing.lasts(request):
            prompt = self.prompts.get((request, str(span.row.get("sequence", ""))))
            part = choosing.part(request, span.first, span.length, prompt)
            return None if part is None or not part[1] else (span.begin + part[0], part[1])
        if request in self._unsampled:
            return None
        accepted = span.row.get("accepted")
        if accepted:
            return span.begin + min(span.length, accepted) - 1, 1
        count = min(span.length, 1 + int(span.row.get("drafts", 0)))
        return span.begin + span.length - count, count

    def document(self) -> Json:
        """The keys of ``step.json`` that say whose rows are whose, in what is stored."""
        if self._main is None and not self.told:
            return {}
        if self.told:
            self.note()
        found: Json = {}
        if self._main is not None:
            (rows,) = self._main.sets
            found["rows"], padded = self._stored(self._main, rows)
            if padded:
                found["padded_rows"] = padded
            if rows.batched and not self._cuts:
                found["batched"] = True
        listed = [part for part in self._parts if part.calls]
        main = self._main
        if main and (main.renumbers or main.leaves_doubt(sum(row["rows"] for row in found["rows"]))):
            listed.insert(0, main)
        if self.told:
            found["call_rows"] = [self._entry(part) for part in listed]
            if self.before is not None:
                found["before_rows"] = [] if self._cuts else list(self.before)
        return found

    def _entry(self, part: _Part) -> Json:
        known = dict(zip(part.calls, part.indices, strict=True))
        entry: Json = {"calls": list(known), "sets": [self._described(part, each) for each in part.sets]}
        if part.renumbers:
            entry["indices"] = list(known.values())
        if part.whole and self._cuts:
            entry["whole"] = sorted(map(list, part.whole))
        return entry

    def _described(self, part: _Part, rows: RowSet) -> Json:
        entries, padded = self._stored(part, rows)
        found: Json = {"kind": rows.kind, "rows": entries}
        # What was cut was certain, and what was not is named with its shape.
        if rows.grid is not None and not self._cuts:
            found["grid"] = grid_entry(rows.grid)
        found |= {key: True for key in ("vectors", "batched") if getattr(rows, key) and not self._cuts}
        if rows.single and not self._cuts:
            found["single"] = list(map(list, rows.single))
        return found | ({"padded_rows": padded} if padded else {})

    @property
    def _cuts(self) -> bool:
        return self._choosing.cuts

    def _stored(self, part: _Part, rows: RowSet) -> tuple[list[Json], int]:
        if not self._cuts:
            return [dict(row) for row in rows.rows], rows.padded
        return self._kept(part, rows).rows, 0


def _in_some_order(rows: RowSet) -> RowSet:
    return rows.without_positions if rows.kind == ITEM_TOKENS else rows
