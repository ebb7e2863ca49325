"""The comparison of one pair of tensors: the unit of work that a thread, process or cluster does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..errors import ReadError
from ..reader import Run, open_run
from .match import Pair, Piece, Source
from .measure import EXACT, Tolerance, measure
from .results import Status, TensorResult


@dataclass(frozen=True, slots=True)
class Task:
    """Where the runs lie and how to compare; ``token`` sets one comparison's open runs apart."""

    a: str
    b: str
    tolerance: Tolerance
    deep: bool
    check_dtype: bool
    token: str


_SHARED: dict[tuple[str, str], Run] = {}


def share(task: Task, a: Run, b: Run) -> None:
    """Let this process's workers use runs that are open already, until `unshare`."""
    _SHARED[task.token, task.a], _SHARED[task.token, task.b] = a, b


def unshare(task: Task) -> None:
    """Forget the runs of `share`."""
    for path in {task.a, task.b}:
        _SHARED.pop((task.token, path), None)


def _opened(path: str, token: str) -> Run:
    shared = _SHARED.get((token, path))
    return _reopened(path, token) if shared is None else shared


@lru_cache(maxsize=4)
def _reopened(path: str, token: str) -> Run:
    """The run in another process than the one that compares."""
    return open_run(path)


def compare_pair(task: Task, pair: Pair) -> list[TensorResult]:
    """The results for a pair's pieces. A tensor that cannot be read gives a result that says so."""
    a, b = _opened(task.a, task.token), _opened(task.b, task.token)
    if not task.deep and _settled(a, b, pair):
        return [_result(pair, pieces, "bitwise") for pieces in pair.pieces]
    try:
        x, y = _load(a, pair.a), _load(b, pair.b)
    except ReadError as error:
        return [_result(pair, pieces, "unreadable", reason=str(error)) for pieces in pair.pieces]
    return [_compared(task, pair, pieces, _cut(x, pieces[0]), _cut(y, pieces[1])) for pieces in pair.pieces]


def _settled(a: Run, b: Run, pair: Pair) -> bool:
    """Whether hashes alone show equality: both files are there, in the size that ``step.json`` says."""
    if len(pair.a.names) > 1 or len(pair.b.names) > 1:
        return False
    mine, theirs = pair.a.records[0], pair.b.records[0]
    same = all(mine.get(key) == theirs.get(key) for key in ("hash", "dtype", "shape")) and mine.get("hash")
    return (
        bool(same)
        and all(one.rows == other.rows for one, other in pair.pieces)
        and a.step(pair.a.step).holds(pair.a.names[0])
        and b.step(pair.b.step).holds(pair.b.names[0])
    )


def _load(run: Run, source: Source) -> torch.Tensor:
    step = run.step(source.step)
    total = step.tensor(source.names[0])
    for name in source.names[1:]:
        # In float32, since the model adds the residual there before it rounds.
        total = total.float() + step.tensor(name).float()
    return total


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return tensor if piece.rows is None else tensor[piece.rows[0] : piece.rows[1]]


def _compared(
    task: Task, pair: Pair, pieces: tuple[Piece, Piece], x: torch.Tensor, y: torch.Tensor
) -> TensorResult:
    if x.shape != y.shape:
        x, y = _without_batch(x, y)
    if x.shape != y.shape:
        reason = f"shapes {tuple(x.shape)} and {tuple(y.shape)} differ"
        return _result(pair, pieces, "different", reason=reason)
    if task.check_dtype and x.dtype != y.dtype:
        return _result(pair, pieces, "different", reason=f"dtypes {x.dtype} and {y.dtype} differ")
    measures = measure(x, y, task.tolerance)
    status: Status = "bitwise" if measures.bitwise else "different" if measures.mismatched else "close"
    return replace(_result(pair, pieces, status), measures=measures)


def _without_batch(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop a batch dimension of one that only one side has, as Hugging Face has beside vLLM."""
    if x.dim() == y.dim() + 1 and x.shape[0] == 1:
        return x[0], y
    if y.dim() == x.dim() + 1 and y.shape[0] == 1:
        return x, y[0]
    return x, y


def _result(
    pair: Pair, pieces: tuple[Piece, Piece], status: Status, reason: str | None = None
) -> TensorResult:
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
        shapes=(tuple(a["shape"]), tuple(b["shape"])),
        measures=EXACT if status == "bitwise" else None,
        reason=reason,
        request=pieces[0].request,
        first_position=pieces[0].first_position,
    )
