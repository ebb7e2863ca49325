"""The comparison of a few pairs of tensors: the unit of work that a thread, process or cluster does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ReadError
from ..layout.grids import as_rows
from ..layout.row_scale import as_stored, is_scaled
from ..reader import Run, Step, TensorStream, open_run
from ..reader.tensor_stream import SMALL, in_memory, open_together
from ..record import Json
from .details import Details, DetailSums
from .experts import IN_ANOTHER_ORDER, in_order_of, other_experts
from .matching.pairs import Columns, Located, Pair, Piece, key_name
from .measure import CHUNK, EXACT, Coarse, Sums, Tolerance
from .results import Status, TensorResult
from .row_norms import Doubles
from .rulebook import Rule, Rulebook

# Tensors that were read already, by step and name, and those that could not be.
Ready = dict[tuple[int, str], TensorStream | ReadError]


@dataclass(frozen=True)
class Place:
    """Where a run lies, and how to open it from anywhere. The options may be secrets: no log shows them."""

    path: str
    options: dict[str, object] | None = field(default=None, repr=False, hash=False)


@dataclass(frozen=True, slots=True)
class Task:
    """Where the runs lie (A, B, others) and how to compare; ``token`` sets one comparison's runs apart."""

    places: tuple[Place, ...]
    tolerance: Tolerance
    check_dtype: bool
    token: str
    rulebook: Rulebook = field(default_factory=Rulebook)


_SHARED: dict[tuple[str, int], Run] = {}


def share(task: Task, *runs: Run) -> None:
    """Let this process's workers use runs that are open already, until `unshare`."""
    _SHARED.update({(task.token, side): run for side, run in enumerate(runs)})


def unshare(task: Task) -> None:
    """Forget the runs of `share`."""
    for side in range(len(task.places)):
        _SHARED.pop((task.token, side), None)


def opened(task: Task, side: int) -> Run:
    """The run of a side (0: A, 1: B), or the one that stands there among the task's places."""
    run = _SHARED.get((task.token, side))
    return _reopened(task.token, task.places[side]) if run is None else run


@lru_cache(maxsize=8)
def _reopened(token: str, place: Place) -> Run:
    """The run in another process than the one that compares."""
    return open_run(place.path, place.options)


def compare_pairs(task: Task, pairs: Sequence[Pair]) -> list[list[TensorResult]]:
    """The results for each pair's pieces. A tensor that cannot be read gives a result that says so."""
    # Held, since a run lets go of steps that nobody holds.
    held = {(side, source.step) for pair in pairs for side, source in enumerate((pair.a, pair.b))}
    steps = []
    with suppress(ReadError):
        steps += [opened(task, side).step(number) for side, number in held]
    ready = [_ready(task, side, pairs) for side in (0, 1)]
    results = [compare_pair(task, pair, ready) for pair in pairs]
    steps.clear()
    return results


def _ready(task: Task, side: int, pairs: Sequence[Pair]) -> Ready:
    """A side's small tensors, read together; not those that are joined from parts or turned."""
    sources = ((pair.a, pair.b)[side] for pair in pairs if _axis(pair, side) <= 1)
    records = {
        (source.step, name): record
        for source in sources
        if not (source.unshard or source.shards or source.by or source.columns)
        for name, record in zip(source.names, source.records, strict=True)
        if record["bytes"] <= SMALL
    }
    with suppress(ReadError):
        streams = open_together(opened(task, side).stored, list(records.values()))
        return dict(zip(records, streams, strict=True))
    return {}


def compare_pair(task: Task, pair: Pair, ready: Sequence[Ready | None] = (None, None)) -> list[TensorResult]:
    """The results for a pair's pieces; ``ready`` has tensors of both sides that were read already."""
    try:
        with ExitStack() as stack:
            x = Operand(opened(task, 0), pair.a, stack, _axis(pair, 0), ready[0])
            y = Operand(opened(task, 1), pair.b, stack, _axis(pair, 1), ready[1])
            return [_compared(task, pair, pieces, x, y) for pieces in pair.pieces]
    except ReadError as error:
        return [result_of(pair, pieces, "unreadable", reason=str(error)) for pieces in pair.pieces]


def _axis(pair: Pair, side: int) -> int:
    """The axis of positions of a side's tensor; all its pieces have one."""
    return pair.pieces[0][side].axis if pair.pieces else 0


class Operand:
    """One side of a pair: a stored tensor, or the sum of several in float32.

    With an ``axis`` of positions its samples and positions are one leading axis of rows.
    """

    def __init__(
        self, run: Run, source: Located, stack: ExitStack, axis: int = 0, ready: Ready | None = None
    ) -> None:
        step = run.step(source.step)
        self._payloads: list[TensorStream] = []
        for name in source.names:
            if source.by is not None:
                payload = in_memory(self._by_experts(step, name, source, axis))
            elif source.columns is not None:
                payload = in_memory(_columns(_tensor(step, name, source), source.columns, axis))
            elif axis > 1:
                payload = in_memory(as_rows(_tensor(step, name, source), axis))
            elif name in source.shards:
                payload = in_memory(_tensor(step, name, source))
            else:
                # It is closed when this pair is done; whoever has the same one again reads it again.
                held = None if ready is None else ready.pop((source.step, name), None)
                if isinstance(held, ReadError):
                    raise held
                payload = step.payload(name, source.unshard) if held is None else held
            stack.callback(payload.close)
            self._payloads.append(payload)
        first = self._payloads[0]
        self.shape, self.stored = first.shape, first.dtype
        if axis == 1:
            self.shape = (prod(first.shape[:2]), *first.shape[2:])
        # In float32, since the model adds the residual there before it rounds.
        self.dtype = first.dtype if len(self._payloads) == 1 else torch.float32
        stored = list(map(as_stored, source.records if source.whole is None else [source.whole]))
        self.is_scaled = any(map(is_scaled, stored))
        # Of a sum over ranks it is not known here how coarse each summand was.
        self.is_summed = source.unshard and any(each.get("part", {}).get("sum") for each in source.records)
        # Of a part of a row, or of a sum of rows, the row whose scale it had is another one.
        apart = source.columns is not None or len(source.names) > 1
        named = zip(source.names, stored, strict=True) if apart and self.is_scaled else ()
        peaks = [self._peaks_of(step, name, source, axis) for name, each in named if is_scaled(each)]
        self._peaks: Doubles | None = np.sum(peaks, axis=0) if peaks else None
        if any(payload.shape != first.shape for payload in self._payloads):
            raise ReadError(f"{source.names} cannot be added, their shapes differ")

    def _by_experts(self, step: Step, name: str, source: Located, axis: int) -> torch.Tensor:
        """The values of each token in the order of its experts, where both runs have them so."""
        assert source.by is not None
        values, experts = (
            as_rows(_tensor(step, each, source), axis if axis > 1 else 0) for each in (name, source.by[0])
        )
        try:
            return in_order_of(experts, values)
        except ValueError as error:
            raise ReadError(f"{name}: {error}") from error

    def read(self, begin: int, end: int) -> torch.Tensor:
        """The flat values ``[begin, end)``, valid until the next call."""
        values = self._payloads[0].read(begin, end)
        if len(self._payloads) > 1:
            values = values.float()
            for payload in self._payloads[1:]:
                values = values + payload.read(begin, end).float()
        return values

    def _peaks_of(self, step: Step, name: str, source: Located, axis: int) -> Doubles:
        """The largest magnitude in each of a tensor's rows."""
        tensor = (
            as_rows(_tensor(step, name, source), axis if axis > 1 else 0).double().nan_to_num(0.0, 0.0, 0.0)
        )
        found: Doubles = tensor.abs().amax(-1).flatten().numpy()
        return found

    def coarse(self, piece: Piece) -> bool | Doubles:
        """Whether a piece's rows have a scale each; of other rows that had, their largest values."""
        if self._peaks is None:
            return self.is_scaled
        begin, shape = self.cut(piece)
        first = begin // shape[-1]
        return self._peaks[first : first + prod(shape[:-1])]

    def values(self, piece: Piece) -> torch.Tensor:
        """All values of a piece."""
        begin, shape = self.cut(piece)
        return self.read(begin, begin + prod(shape)).clone().reshape(shape)

    def cut(self, piece: Piece) -> tuple[int, tuple[int, ...]]:
        """Where a piece begins, in values, and its shape."""
        if piece.rows is None:
            return 0, self.shape
        begin, end = piece.rows
        if not self.shape or end > self.shape[0]:
            raise ReadError(f"rows {begin} to {end} are not in a tensor of shape {self.shape}")
        return begin * prod(self.shape[1:]), (end - begin, *self.shape[1:])


def _tensor(step: Step, name: str, source: Located) -> torch.Tensor:
    """A tensor of a side, joined from what ranks have of it."""
    if name not in source.shards:
        return step.tensor(name, source.unshard)
    names, widths = source.shards[name]
    tensors = [step.tensor(each) for each in names]
    if len({each.shape for each in tensors}) > 1 or tensors[0].shape[-1] != sum(widths):
        raise ReadError(f"{name}: the ranks' parts are not as large as they were said to be")
    split = [torch.split(each, list(widths), -1) for each in tensors]
    return torch.cat([each[place] for place in range(len(widths)) for each in split], -1)


def _columns(tensor: torch.Tensor, columns: Columns, axis: int) -> torch.Tensor:
    """Some columns of a fused projection's result."""
    begin, end, total = columns
    if tensor.shape[-1] != total:
        raise ReadError(f"a fused result of shape {list(tensor.shape)} has other parts than {total} columns")
    found = tensor[..., begin:end].contiguous()
    return as_rows(found, axis) if axis > 1 else found


def chunks(x: Operand, y: Operand, pieces: tuple[Piece, Piece], add: Callable[..., None]) -> None:
    """Call ``add`` with the values of two pieces of one size, a chunk at a time."""
    (begin_x, shape), (begin_y, _) = x.cut(pieces[0]), y.cut(pieces[1])
    total = prod(shape)
    for begin in range(0, total, CHUNK):
        end = min(begin + CHUNK, total)
        add(x.read(begin_x + begin, begin_x + end), y.read(begin_y + begin, begin_y + end))


def _compared(task: Task, pair: Pair, pieces: tuple[Piece, Piece], x: Operand, y: Operand) -> TensorResult:
    shapes = x.cut(pieces[0])[1], y.cut(pieces[1])[1]
    if not _alike(*shapes, pair.reordered):
        return result_of(pair, pieces, "different", reason=f"shapes {shapes[0]} and {shapes[1]} differ")
    if task.check_dtype and x.dtype != y.dtype:
        return result_of(pair, pieces, "different", reason=f"dtypes {x.dtype} and {y.dtype} differ")
    rule = task.rulebook.of(key_name(pair.key))
    if rule is not None:
        return _ruled(task, rule, pair, pieces, x, y)
    tolerance = task.tolerance.between(x.stored, y.stored)
    coarse: Coarse = (False, False)
    scaled = [each for each in (x, y) if each.is_scaled]
    if any(each.is_summed for each in scaled):
        tolerance = tolerance.of_scaled_rows()
    elif scaled and tolerance.is_default:
        tolerance = replace(tolerance, norm=True)
        coarse = x.coarse(pieces[0]), y.coarse(pieces[1])
    sums = Sums(tolerance, x.dtype, y.dtype, shapes[1], coarse)
    chunks(x, y, pieces, sums.add)
    measures = sums.measures()
    status: Status = "bitwise" if measures.bitwise else "close" if measures.agrees else "different"
    reason = None if pair.a.by is None else _of_experts(task, pair, pieces, x, y)
    if reason is not None and status == "bitwise":
        status = "close"
    return replace(result_of(pair, pieces, status, reason), measures=measures)


def _of_experts(task: Task, pair: Pair, pieces: tuple[Piece, Piece], x: Operand, y: Operand) -> str | None:
    """What to know of two sides that are compared in the order of the experts."""
    with ExitStack() as stack:

        def other(side: int, **changes: Any) -> torch.Tensor:
            source = replace((pair.a, pair.b)[side], by=None, **changes)
            return Operand(opened(task, side), source, stack, _axis(pair, side)).values(pieces[side])

        a, b = x.values(pieces[0]), y.values(pieces[1])
        if _are_equal(a, b):
            return None if _are_equal(other(0), other(1)) else IN_ANOTHER_ORDER
        if not pair.a.is_experts:
            return None
        names = pair.a.logits, pair.b.logits
        logits = [None if name is None else other(side, names=(name,)) for side, name in enumerate(names)]
    return other_experts(a, b, logits, pieces[0].first_position)


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether values are the same, in whatever dtype: one tool has experts in 32 bits, another in 64."""
    return torch.equal(a.double(), b.double())


def _ruled(
    task: Task, rule: Rule, pair: Pair, pieces: tuple[Piece, Piece], x: Operand, y: Operand
) -> TensorResult:
    """The result of a tensor that a rule is for."""
    times = growth(rule, pair, pieces)
    sums = Sums(rule.tolerance(times), x.dtype, y.dtype, y.cut(pieces[1])[1])
    chunks(x, y, pieces, sums.add)
    details = None if rule.ulp is None else _details(x, y, pieces)
    measures = sums.measures()
    broken = rule.broken(measures, details, times)
    experts = _of_experts(task, pair, pieces, x, y) if broken and pair.a.by is not None else None
    status: Status = "different" if broken else "bitwise" if measures.bitwise else "close"
    found = result_of(pair, pieces, status, "; ".join(filter(None, (broken, experts))) or None)
    measures = replace(measures, agrees=broken is None)
    return replace(found, measures=measures, rule=rule.match.pattern, details=details)


def growth(rule: Rule, pair: Pair, pieces: tuple[Piece, Piece]) -> float:
    """How many times a rule's tolerance holds for a piece of a pair."""
    first, rows = pieces[0].first_position, pieces[0].rows
    last = None if first is None or rows is None else first + rows[1] - rows[0] - 1
    return rule.times(pair.key[1], last, pair.a.step)


def details_of(runs: tuple[Run, Run], pair: Pair, pieces: tuple[Piece, Piece]) -> Details:
    """The details of one compared pair. Raises ReadError when a tensor cannot be read any more."""
    with ExitStack() as stack:
        x, y = (
            Operand(run, source, stack, piece.axis)
            for run, source, piece in zip(runs, (pair.a, pair.b), pieces, strict=True)
        )
        return _details(x, y, pieces)


def _details(x: Operand, y: Operand, pieces: tuple[Piece, Piece]) -> Details:
    sums = DetailSums(x.dtype, y.dtype)
    chunks(x, y, pieces, sums.add)
    return sums.details()


def _alike(a: Sequence[int], b: Sequence[int], reordered: bool) -> bool:
    """Whether values of two shapes stand in the same order, but for a batch of one."""
    if reordered and [each for each in a if each != 1] == [each for each in b if each != 1]:
        return True
    if len(a) == len(b):
        return tuple(a) == tuple(b)
    return without_batch(a) == without_batch(b) and abs(len(a) - len(b)) == 1


def without_batch(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without a batch dimension of one, as Hugging Face has it beside vLLM."""
    return tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)


def result_of(
    pair: Pair, pieces: tuple[Piece, Piece], status: Status, reason: str | None = None
) -> TensorResult:
    """A result for one piece of a pair, without measures unless it is bitwise equal."""
    rank, module, call, _, path = pair.key
    a, b = pair.a.records[0], pair.b.records[0]
    return TensorResult(
        status=status,
        step=pair.a.step,
        rank=rank,
        module=module,
        call=call,
        direction=a["direction"],
        path=path,
        names=(pair.a.names[0], pair.b.names[0]),
        dtypes=(a["dtype"], b["dtype"]),
        shapes=(_shape(a), _shape(b)),
        measures=EXACT if status == "bitwise" else None,
        reason=reason,
        request=pieces[0].request,
        first_position=pieces[0].first_position,
    )


def _shape(record: Json) -> tuple[int, ...]:
    return tuple(record["shape"])


def place_of(run: Run | Path | str, options: dict[str, object]) -> Place:
    """How another process opens the run."""
    path = run.url if isinstance(run, Run) else str(run)
    return Place(path, options or None)
