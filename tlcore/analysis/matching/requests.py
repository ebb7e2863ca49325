"""Pairing of runs per request, or sample, and token position, since batches differ from run to run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType

from ...errors import ReadError
from ...layout.names import PathKey
from ...layout.rows import Span
from ...reader import Step
from ...record import Json
from ..results import Gap, TensorResult
from .bridge import plans
from .keyed import keyed
from .loose import Loose, loose_notes, pair_loose
from .pairs import Key, Located, Pair, Piece, absent
from .pooled import Pooled, pair_pooled
from .prompts import pair_requests
from .ranks import with_shards_joined
from .ranks_of_both import held_by_ranks_of_all
from .rules import Rules

_LARGEST = 1 << 50
_PLACES = ("first_token_indices_gpu", "last_token_indices_gpu", "num_scheduled_tokens_cpu")
# Of what vLLM's poolers are given: the rows that earlier steps left of a request, as many as there were.
_LEFT = "pooling_states"


@dataclass(frozen=True, slots=True)
class _Span:
    """The rows ``begin`` to ``begin + count`` of a source, which are positions ``first`` onwards.

    ``unsampled`` ones are there because a chunk of what was prefilled ended with them.
    """

    source: Located
    request: str
    begin: int
    count: int
    first: int
    axis: int
    unsampled: bool


def match_requests(
    steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules
) -> tuple[list[Pair], list[TensorResult], list[str]]:
    """Pair every request's rows of every tensor by position, whichever steps they were computed in."""
    for step in (*steps_a, *steps_b):
        if not all(map(_is_row, step.rows or ())):
            raise ReadError(f"{step!r}: damaged rows in its step.json")
    labels_a, labels_b, notes = pair_requests(steps_a, steps_b, rules.requests)
    keyed_a = [(step, keyed(step, rules, rename=True)) for step in steps_a]
    keyed_b = [(step, keyed(step, rules, rename=False)) for step in steps_b]
    if rules.both_spread:
        both = (keyed_a, keyed_b) if rules.spread == 0 else (keyed_b, keyed_a)
        held_by_ranks_of_all(*both, rules.ranks)
    if rules.spread is not None:
        spread, whole = (keyed_a, keyed_b) if rules.spread == 0 else (keyed_b, keyed_a)
        held = _merged(whole)
        spread[:] = [(step, with_shards_joined(found, held, rules.ranks)) for step, found in spread]
    plan_a, plan_b = plans(_merged(keyed_a), _merged(keyed_b), rules, (steps_a, steps_b))
    applied_a = [(step, plan_a.apply(found)) for step, found in keyed_a]
    applied_b = [(step, plan_b.apply(found)) for step, found in keyed_b]
    loose, pooled = (Loose(), Loose()), (Pooled(), Pooled())
    sides = zip((applied_a, applied_b), (labels_a, labels_b), loose, pooled, strict=True)
    mine, theirs = (_spans(*side) for side in sides)
    cached = _Uncomputed("A", steps_a, labels_a), _Uncomputed("B", steps_b, labels_b)
    grouped: dict[tuple[Key, int, str, int, str], Pair] = {}
    missing: list[TensorResult] = []
    for identity, spans in mine.items():
        key, request = identity
        for span in spans:
            others = list(_overlaps(span, theirs.get(identity, [])))
            if cached[1].lacks(span, others) and not loose[1].may_have(key):
                missing.append(absent(key, span.source, 0, request, _rest(span, others)))
            for other, first, count in others:
                place = (
                    key,
                    span.source.step,
                    span.source.names[0],
                    other.source.step,
                    other.source.names[0],
                )
                pair = grouped.get(place, Pair(key, span.source, other.source, ()))
                pieces = (_piece(span, first, count), _piece(other, first, count))
                grouped[place] = Pair(key, pair.a, pair.b, (*pair.pieces, pieces))
    for identity, spans in theirs.items():
        key, request = identity
        for span in spans:
            here = list(_overlaps(span, mine.get(identity, [])))
            if cached[0].lacks(span, here) and not loose[0].may_have(key):
                missing.append(absent(key, span.source, 1, request, _rest(span, here)))
    wholes, more = pair_loose(*loose)
    results, lacking = pair_pooled(*pooled)
    missing += [*more, *lacking]
    order = {
        id(each): place
        for place, each in enumerate(each for _, found in applied_a for each in found.values())
    }
    pairs = sorted([*grouped.values(), *wholes, *results], key=lambda pair: (pair.a.step, order[id(pair.a)]))
    return pairs, missing, [*notes, *loose_notes(*loose), *cached[0].notes(), *cached[1].notes()]


class _Uncomputed:
    """What a run need not have: positions from vLLM's prefix cache, results at the ends of other chunks."""

    def __init__(self, run: str, steps: Sequence[Step], labels: Mapping[str, str]) -> None:
        self._run = run
        self._ends: dict[str, int] = defaultdict(int)
        self._used: set[str] = set()
        self._chunks: set[tuple[str, int]] = set()
        for row in (row for step in steps for row in step.rows or ()):
            label, end = labels[str(row["request_id"])], row.get("cached", 0)
            if type(end) is int:
                self._ends[label] = max(self._ends[label], end)

    def lacks(self, span: _Span, here: Sequence[tuple[_Span, int, int]]) -> bool:
        """Whether this run, which has the positions ``here`` of the other's span, should have more of it."""
        if span.unsampled and not here:
            self._chunks.add((span.request, span.first))
            return False
        expected, end = span.first, span.first + span.count
        cached = self._ends[span.request]
        gaps = []
        for first, count in sorted((first, count) for _, first, count in here):
            if first > expected:
                gaps.append(first)
            expected = max(expected, first + count)
        if expected < end:
            gaps.append(end)
        if gaps and gaps[-1] <= cached:
            self._used.add(span.request)
        return bool(gaps) and gaps[-1] > cached

    def notes(self) -> list[str]:
        """What to know of positions that this run has not computed."""
        notes: list[str] = []
        if self._used:
            positions = sum(self._ends[request] for request in self._used)
            where = f"{positions} leading positions of {len(self._used)} requests"
            notes.append(Gap(f"{self._run} took {where} from its prefix cache and has no values of them"))
        if self._chunks:
            ends = f"{len(self._chunks)} positions at which the other run's chunks of prompts ended"
            notes.append(Gap(f"{self._run} computed no logits at {ends}, and nothing was sampled there"))
        return notes


def _merged(steps: Sequence[tuple[Step, dict[Key, Located]]]) -> dict[Key, Located]:
    """Each key that any step has, with the tensor of the first."""
    merged: dict[Key, Located] = {}
    for _, found in steps:
        merged = {**found, **merged}
    return merged


def _spans(
    steps: Sequence[tuple[Step, dict[Key, Located]]], labels: Mapping[str, str], loose: Loose, pooled: Pooled
) -> dict[tuple[Key, str], list[_Span]]:
    """The rows of each request in each tensor, over all steps."""
    found: dict[tuple[Key, str], list[_Span]] = defaultdict(list)
    for step, tensors in steps:
        for key, source in tensors.items():
            rank, module, call, direction, path = key
            record = source.records[0]
            index = step.index_in_model(record)
            if step.rows is not None:
                # Modules that go by one name are numbered through.
                index += call - int(record["call"])
            counted = (rank, module, index, direction, path)
            if pooled.take(step, key, counted, source, labels):
                continue
            mask = _is_mask(step, path) or _is_place(step, path)
            spans = [] if mask else list(_rows_of(source, step, labels))
            if spans:
                loose.add_rows(step, key, counted, source, labels)
            else:
                loose.add(step, key, counted, source, labels, mask)
            for span in spans:
                found[counted, span.request].append(span)
    return found


def _is_mask(step: Step, path: Sequence[PathKey]) -> bool:
    """Whether a tensor says where the padding of a batch is, and so differs where only that does."""
    return step.rows is None and bool(path) and "mask" in str(path[-1])


def _is_place(step: Step, path: Sequence[PathKey]) -> bool:
    """Whether a tensor says where in vLLM's batches a request's tokens are, as those of poolers do."""
    last = str(path[-1]) if path else ""
    return step.rows is not None and (last.endswith(_PLACES) or _LEFT in path)


def _is_row(row: Json) -> bool:
    numbers = [row.get(key) for key in ("first_row", "rows", "first_position")]
    named = isinstance(row.get("request_id"), str)
    named &= all(
        isinstance(row.get(key, ""), (str, NoneType)) for key in ("external_request_id", "prompt_hash")
    )
    return named and all(type(number) is int and 0 <= number < _LARGEST for number in numbers)


def _rows_of(source: Located, step: Step, labels: Mapping[str, str]) -> Iterator[_Span]:
    usual = step.sequence_of(source.laid_out)
    for span in map(Span.kept, step.row_spans(source.laid_out)):
        if span.length and span.first is not None:
            request = labels[str(span.row["request_id"])]
            sequence = span.row.get("sequence", usual)
            if sequence:
                request = f"{request}@{sequence}"
            unsampled = span.row.get("unsampled") is True
            yield _Span(source, request, span.begin, span.length, span.first, span.axis, unsampled)


def _overlaps(span: _Span, others: Sequence[_Span]) -> Iterator[tuple[_Span, int, int]]:
    """Spans with positions in common: (other, first common position, how many)."""
    for other in others:
        first = max(span.first, other.first)
        count = min(span.first + span.count, other.first + other.count) - first
        if count > 0:
            yield other, first, count


def _rest(span: _Span, here: Sequence[tuple[_Span, int, int]]) -> str:
    """What of a span is not among the positions ``here``, in words."""
    if not here:
        return "it"
    held = {at for _, first, count in here for at in range(first, first + count)}
    lacking = [at for at in range(span.first, span.first + span.count) if at not in held]
    between = "" if lacking[-1] - lacking[0] < len(lacking) else f", {len(lacking)} in all"
    if len(lacking) == 1:
        return f"its position {lacking[0]}"
    return f"its positions {lacking[0]} to {lacking[-1]}{between}"


def _piece(span: _Span, first: int, count: int) -> Piece:
    begin = span.begin + first - span.first
    return Piece(span.request, (begin, begin + count), first, span.axis)
