"""Handing pairs to the workers: in batches, with reading ahead, and without those that hashes settle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

from ..reader import Run
from .matching.pairs import Located, Pair, key_name
from .results import TensorResult
from .work import Task, compare_pairs, growth, result_of

Identity = tuple[object, ...]
Found = list[TensorResult]
_BATCH_PAIRS = 64
# Where the tensors of many steps lie in one piece, which is then read at once.
_BATCH_OF_ARRAYS = 4096
_BATCH_BYTES = 8 << 20
# Batches handed out and not yet collected: enough for a cluster's workers, few enough to read ahead for.
_AHEAD = 64


@dataclass(slots=True)
class _Batch:
    """Consecutive pairs: which are settled, which repeat an earlier pair, and the future of the others."""

    pairs: list[Pair] = field(default_factory=list)
    settled: dict[int, Found] = field(default_factory=dict)
    twins: dict[int, Identity] = field(default_factory=dict)
    firsts: dict[int, Identity] = field(default_factory=dict)
    bytes: int = 0
    most: int = _BATCH_PAIRS
    future: Future[list[Found]] | None = None

    @property
    def full(self) -> bool:
        """Whether it is worth a worker's while."""
        return len(self.pairs) >= self.most or self.bytes >= _BATCH_BYTES

    def open_pairs(self) -> list[tuple[int, Pair]]:
        """The pairs that have to be read, with their places."""
        known = self.settled.keys() | self.twins.keys()
        return [(place, pair) for place, pair in enumerate(self.pairs) if place not in known]


def in_order(
    pool: Executor, task: Task, pairs: Iterable[Pair], runs: tuple[Run, Run], deep: bool
) -> Iterator[Found]:
    """Each pair's results, in the pairs' order. Without ``deep`` hashes settle what they can.

    Two hashes that were compared once are not compared again: a module's output is often the next one's
    input.
    """
    waiting: deque[_Batch] = deque()
    compared: dict[Identity, Found] = {}
    try:
        for batch in _batches(task, pairs, runs, deep):
            todo = [pair for _, pair in batch.open_pairs()]
            if todo:
                _read_ahead(todo, runs)
                batch.future = pool.submit(compare_pairs, task, todo)
            waiting.append(batch)
            while waiting and (len(waiting) > _AHEAD or _finished(waiting[0])):
                yield from _collected(waiting.popleft(), compared)
        while waiting:
            yield from _collected(waiting.popleft(), compared)
    finally:
        for batch in waiting:
            if batch.future is not None:
                batch.future.cancel()


def _finished(batch: _Batch) -> bool:
    return batch.future is None or batch.future.done()


def _batches(task: Task, pairs: Iterable[Pair], runs: tuple[Run, Run], deep: bool) -> Iterator[_Batch]:
    most = _BATCH_OF_ARRAYS if all(run.stored.has_arrays for run in runs) else _BATCH_PAIRS
    batch, seen = _Batch(most=most), set[Identity]()
    for pair in pairs:
        place = len(batch.pairs)
        batch.pairs.append(pair)
        identity = None if deep else _identity(task, pair, runs)
        if identity is not None and _equal(pair):
            batch.settled[place] = [result_of(pair, pieces, "bitwise") for pieces in pair.pieces]
        elif identity is not None and identity in seen:
            batch.twins[place] = identity
        else:
            batch.bytes += sum(int(record["bytes"]) for record in (*pair.a.records, *pair.b.records))
            if identity is not None:
                seen.add(identity)
                batch.firsts[place] = identity
        if batch.full:
            yield batch
            batch = _Batch(most=most)
    if batch.pairs:
        yield batch


def _collected(batch: _Batch, compared: dict[Identity, Found]) -> Iterator[Found]:
    measured = dict(batch.settled)
    if batch.future is not None:
        places = [place for place, _ in batch.open_pairs()]
        measured.update(zip(places, batch.future.result(), strict=True))
    for place, pair in enumerate(batch.pairs):
        if place in batch.twins:
            found = [
                replace(
                    result_of(pair, pieces, twin.status, twin.reason),
                    measures=twin.measures,
                    rule=twin.rule,
                    details=twin.details,
                )
                for pieces, twin in zip(pair.pieces, compared[batch.twins[place]], strict=True)
            ]
        else:
            found = measured[place]
            if place in batch.firsts:
                compared[batch.firsts[place]] = found
        yield found


def _identity(task: Task, pair: Pair, runs: tuple[Run, Run]) -> Identity | None:
    """What determines a pair's results; None without hashes, or where a file is not as ``step.json`` says."""
    records = (*pair.a.needed, *pair.b.needed)
    hashed = all(record.get("hash") for record in records)
    if not hashed or not all(map(_held, runs, (pair.a, pair.b))):
        return None
    described = tuple((str(r["hash"]), str(r["dtype"]), tuple(r["shape"])) for r in records)
    rows = tuple((one.rows, one.axis, other.rows, other.axis) for one, other in pair.pieces)
    rule = task.rulebook.of(key_name(pair.key)) if task.rulebook.tolerances else None
    held = () if rule is None else (rule, *(growth(rule, pair, pieces) for pieces in pair.pieces))
    told: Identity = ()
    if pair.a.is_experts:
        # The words for them name tokens and what they were chosen by.
        told = (pair.a.logits, pair.b.logits, *(one.first_position for one, _ in pair.pieces))
    return (len(pair.a.needed), pair.a.is_experts, told, described, rows, held)


def _held(run: Run, source: Located) -> bool:
    return all(map(run.stored.holds, source.needed))


def _equal(pair: Pair) -> bool:
    """Whether the hashes say that both sides are the same values."""
    keys = ("hash", "dtype", "shape")
    sides = [[tuple(map(str, map(record.get, keys))) for record in side.needed] for side in (pair.a, pair.b)]
    return sides[0] == sides[1] and all(
        (one.rows, one.axis) == (other.rows, other.axis) for one, other in pair.pieces
    )


def _read_ahead(pairs: Sequence[Pair], runs: tuple[Run, Run]) -> None:
    """Ask the system to fetch local files before a worker comes to them."""
    for pair in pairs:
        for run, source in zip(runs, (pair.a, pair.b), strict=True):
            for record in source.records:
                run.stored.advise(record)
