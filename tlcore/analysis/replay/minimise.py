"""The fewest rows of a call's inputs with which its result still differs from what was captured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ReadError
from ...reader import Arguments, Skipped
from ..measure import Tolerance, measure
from .again import Callee, Replayed, run_again, tensors_in
from .given import on_each, tensors_of

Tensors = dict[tuple[Any, ...], torch.Tensor]
# Samples, then tokens.
_DIMENSIONS = (0, 1)
# Of the worst row's error: a row that is off by so much is bad, too.
_MUCH = 0.01


@dataclass(frozen=True, slots=True)
class Smallest:
    """Arguments cut to ``rows`` (first, end) along dimensions; the stored result, by paths, cut alike."""

    arguments: Arguments
    expected: Tensors
    rows: dict[int, tuple[int, int]]


def minimised(found: Replayed, stored: Any, module: Callee, tolerance: Tolerance) -> Smallest:
    """The fewest rows of a replayed call that still differ from ``stored``, its stored result.

    Rows are left out only where the module gives the same for the others without them. Raises ReadError where
    nothing differs.
    """
    expected = {path: each for path, each in tensors_of(stored).items() if not isinstance(each, Skipped)}
    whole = Smallest(found.arguments, expected, {})
    output = tensors_in(found.output)
    if not _differs(output, expected, tolerance):
        raise ReadError(f"{found.call}: nothing differs, so there is nothing to minimise")
    for dimension in _DIMENSIONS:
        smaller = _along(dimension, whole, module, tolerance)
        whole = whole if smaller is None else smaller
    return whole


def _along(dimension: int, whole: Smallest, module: Callee, tolerance: Tolerance) -> Smallest | None:
    """The first cut along one dimension that works; the smallest come first."""
    count = _rows(whole.expected, dimension)
    if count < 2:
        return None
    output = tensors_in(run_again(module, whole.arguments))
    for begin, end in _windows(_off_by(output, whole.expected, dimension), count):
        cut = _Cut(dimension, begin, end, count)
        arguments = Arguments(*on_each((whole.arguments.args, whole.arguments.kwargs), cut))
        expected = {path: cut(each) for path, each in whole.expected.items()}
        try:
            again = tensors_in(run_again(module, arguments))
        except Exception:  # whatever a module makes of such arguments, they are not what is sought
            continue
        same = {path: cut(each) for path, each in output.items()}
        if not _differs(again, same, tolerance) and _differs(again, expected, tolerance):
            return Smallest(arguments, expected, {**whole.rows, dimension: (begin, end)})
    return None


@dataclass(frozen=True, slots=True)
class _Cut:
    dimension: int
    begin: int
    end: int
    count: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor that has them; any other tensor as it is."""
        if tensor.dim() <= self.dimension or tensor.shape[self.dimension] != self.count:
            return tensor
        return tensor.narrow(self.dimension, self.begin, self.end - self.begin).clone()


def _rows(tensors: Tensors, dimension: int) -> int:
    """How many rows all of a result's tensors have; 0 where they do not agree."""
    counts = {each.shape[dimension] if each.dim() > dimension else 0 for each in tensors.values()}
    return int(counts.pop()) if len(counts) == 1 else 0


def _off_by(output: Tensors, expected: Tensors, dimension: int) -> list[float]:
    """How far each row is off at most."""
    total: torch.Tensor | None = None
    for path, stored in expected.items():
        mine = output.get(path)
        if mine is None or mine.shape != stored.shape or not stored.numel():
            continue
        wide = torch.complex128 if stored.is_complex() or mine.is_complex() else torch.float64
        mine, each = mine.cpu().to(wide), stored.cpu().to(wide)
        # Infinity from itself is no number.
        off = (mine - each).abs().masked_fill(mine == each, 0.0).nan_to_num(posinf=1e300, nan=1e300)
        rows = off.movedim(dimension, 0).reshape(off.shape[dimension], -1).amax(1)
        total = rows if total is None else torch.maximum(total, rows)
    return [] if total is None else [float(each) for each in total]


def _windows(off: list[float], count: int) -> Iterator[tuple[int, int]]:
    """Ever larger windows that end with the worst row or the first bad one, then all rows up to these.

    A causal module needs the rows before, of which the first bad row has the fewest.
    """
    if not off:
        return
    worst = off.index(max(off))
    first = next(row for row, each in enumerate(off) if each >= _MUCH * off[worst])
    for row in dict.fromkeys((worst, first)):
        size = 1
        while size <= row:
            yield row + 1 - size, row + 1
            size *= 2
    yield from ((0, row + 1) for row in sorted({first, worst}) if row + 1 < count)


def _differs(
    output: Tensors,
    expected: Tensors,
    tolerance: Tolerance,
) -> bool:
    for path, each in expected.items():
        mine = output.get(path)
        if mine is None or mine.shape != each.shape:
            return True
        allowed = tolerance.between(each.dtype, mine.dtype)
        if not measure(each.cpu(), mine.detach().cpu(), allowed).agrees:
            return True
    return False
