"""How far two tensors are apart relative to their size: as a whole, in their worst row, in one value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from ..matching.pairs import Piece
from ..measure import CHUNK
from ..work import Operand

# A shorter last axis says nothing by itself: a row then goes over as many axes as it takes.
_LEAST_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Distance:
    """Relative differences, 0 where nothing differs and at most 2, of ``count`` values in rows of ``width``.

    ``norm`` is the Euclidean norm of the difference to the larger one of the two tensors' norms, ``row`` the
    largest such quotient of a row, ``value`` the largest difference to the largest magnitude. Of whole
    numbers they are the fractions that differ: of all, of a row, and 0. ``unlike`` counts values of
    which one alone is NaN or infinite. ``rounding`` is the dtypes' machine epsilon, 0 for whole numbers.
    ``spread`` are the sums of the rows' quotients to the powers of 2 and 4.
    """

    norm: float
    row: float
    value: float
    unlike: int
    count: int
    width: int
    rounding: float
    spread: tuple[float, float] = (0.0, 0.0)

    @property
    def sizes(self) -> tuple[float, float, float]:
        """``norm``, ``row`` and ``value``."""
        return self.norm, self.row, self.value

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.unlike or max(self.sizes))


def distance(x: Operand, y: Operand, pieces: tuple[Piece, Piece]) -> Distance | None:
    """The distance of two pieces of one size; None where they have different sizes."""
    (begin_x, shape), (begin_y, other) = x.cut(pieces[0]), y.cut(pieces[1])
    count = prod(shape)
    if count != prod(other):
        return None
    width = _width(shape)
    sums = _Sums(_rounding(x.stored, y.stored))
    for begin, end in _ranges(count, width):
        a = x.read(begin_x + begin, begin_x + end)
        sums.add(a, y.read(begin_y + begin, begin_y + end), width)
    return sums.distance(count, width)


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for extent in reversed(shape):
        if width >= _LEAST_WIDTH:
            break
        width *= extent
    return max(width, 1)


def _ranges(count: int, width: int) -> Iterator[tuple[int, int]]:
    size = width * max(1, CHUNK // width)
    for begin in range(0, count, size):
        yield begin, min(begin + size, count)


def _rounding(*dtypes: torch.dtype) -> float:
    """The machine epsilon of the coarser dtype, 0 where one is of whole numbers."""
    if not all(each.is_floating_point or each.is_complex for each in dtypes):
        return 0.0
    return max(float(torch.finfo(each).eps) for each in dtypes)


class _Sums:
    """What is carried from one chunk of whole rows to the next."""

    def __init__(self, rounding: float) -> None:
        self._rounding = rounding
        self._squares = self._a_squares = self._b_squares = 0.0
        self._largest = self._magnitude = self._row = 0.0
        self._spread = [0.0, 0.0]
        self._unlike = self._wrong = 0

    def add(self, a: torch.Tensor, b: torch.Tensor, width: int) -> None:
        if not self._rounding:
            self._add_whole(a.reshape(-1, width), b.reshape(-1, width))
            return
        wide = self._wide(a, b)
        x, y = a.to(wide).reshape(-1, width), b.to(wide).reshape(-1, width)
        both = x.isfinite() & y.isfinite()
        if not bool(both.all()):
            alike = (x == y) | (x.isnan() & y.isnan())
            self._unlike += int((~both & ~alike).sum())
            x, y = torch.where(both, x, 0), torch.where(both, y, 0)
        sizes = x.abs(), y.abs()
        difference = (x - y).abs()
        squares, a_squares, b_squares = (each.square().sum(1) for each in (difference, *sizes))
        row_norms = torch.maximum(a_squares, b_squares).sqrt()
        quotients = torch.where(squares > 0, squares.sqrt() / row_norms, 0.0)
        self._row = _larger(self._row, float(quotients.max()))
        self._spread[0] += float(quotients.square().sum())
        self._spread[1] += float(quotients.square().square().sum())
        self._largest = _larger(self._largest, float(difference.max()))
        self._magnitude = max(self._magnitude, *(float(each.max()) for each in sizes))
        self._squares += float(squares.sum())
        self._a_squares += float(a_squares.sum())
        self._b_squares += float(b_squares.sum())

    @staticmethod
    def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
        return torch.complex128 if a.is_complex() or b.is_complex() else torch.float64

    def _add_whole(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype != b.dtype:
            # Few of them can be held against each other as they are.
            a, b = (each.to(self._wide(a, b)) for each in (a, b))
        wrong = (a != b).sum(1)
        self._wrong += int(wrong.sum())
        self._row = max(self._row, float(wrong.max()) / a.shape[1])

    def distance(self, count: int, width: int) -> Distance:
        norm = math.sqrt(max(self._a_squares, self._b_squares))
        norm = _quotient(math.sqrt(self._squares), norm)
        if not self._rounding:
            norm = self._wrong / max(count, 1)
        value = _quotient(self._largest, self._magnitude)
        spread = self._spread[0], self._spread[1]
        return Distance(norm, self._row, value, self._unlike, count, width, self._rounding, spread)


def _larger(a: float, b: float) -> float:
    """The larger one; what overflowed is infinitely far apart."""
    return max(a, math.inf if math.isnan(b) else b)


def _quotient(difference: float, size: float) -> float:
    if not difference:
        return 0.0
    return difference / size if math.isfinite(size) and size else math.inf
