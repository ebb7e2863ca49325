"""What the pictures of one pair of tensors need, gathered in two passes without holding the tensors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...reader import Run
from ..matching.pairs import Pair, Piece
from ..work import Operand, chunks

Array = npt.NDArray[Any]
_BINS = 48
_ROWS, _COLUMNS = 64, 128
# Decades of differences that the histogram covers below the largest.
_DECADES = 6


@dataclass(slots=True)
class Sample:
    """Histograms of the values and of the differences, and the largest difference of each region.

    ``heat`` has at most 64 x 128 regions of a matrix of ``rows`` x ``columns``; ``broken`` marks those in
    which one side alone has a NaN or an infinity.
    """

    rows: int
    columns: int
    value_edges: Array
    values_a: Array
    values_b: Array
    difference_edges: Array
    differences: Array
    equal: float
    heat: Array
    broken: Array


def sample(runs: tuple[Run, Run], pair: Pair, pieces: tuple[Piece, Piece]) -> Sample:
    """The sample of one compared pair. Raises ReadError when a tensor cannot be read any more."""
    with ExitStack() as stack:
        x, y = (
            Operand(run, source, stack, piece.axis)
            for run, source, piece in zip(runs, (pair.a, pair.b), pieces, strict=True)
        )
        shape = x.cut(pieces[0])[1]
        found = _ranges(x, y, pieces, shape)
        at = 0

        def add(a: torch.Tensor, b: torch.Tensor) -> None:
            nonlocal at
            _fill(found, _real(a), _real(b), at)
            at += a.numel()

        chunks(x, y, pieces, add)
    found.equal /= max(prod(shape), 1)
    return found


def _real(values: torch.Tensor) -> Array:
    """Values as float64; of complex ones, the magnitudes."""
    wide = values.abs() if values.is_complex() else values
    return np.asarray(wide.to(torch.float64).numpy())


def _ranges(x: Operand, y: Operand, pieces: tuple[Piece, Piece], shape: tuple[int, ...]) -> Sample:
    low, high, largest = np.inf, -np.inf, 0.0

    def add(a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal low, high, largest
        sides = _real(a), _real(b)
        for values in sides:
            finite = values[np.isfinite(values)]
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        with np.errstate(invalid="ignore"):
            difference = np.abs(sides[0] - sides[1])
        finite = difference[np.isfinite(difference)]
        largest = max(largest, float(finite.max()) if finite.size else 0.0)

    chunks(x, y, pieces, add)
    if not low < high:
        low, high = (low - 0.5, low + 0.5) if np.isfinite(low) else (-0.5, 0.5)
    top = largest or 1.0
    columns = shape[-1] if shape else 1
    rows = prod(shape[:-1]) if shape else 1
    grid = min(rows, _ROWS), min(columns, _COLUMNS)
    return Sample(
        rows=rows,
        columns=columns,
        value_edges=np.linspace(low, high, _BINS + 1),
        values_a=np.zeros(_BINS),
        values_b=np.zeros(_BINS),
        difference_edges=np.geomspace(top * 10.0**-_DECADES, top, _BINS + 1),
        differences=np.zeros(_BINS),
        equal=0.0,
        heat=np.zeros(grid),
        broken=np.zeros(grid, bool),
    )


def _fill(found: Sample, a: Array, b: Array, at: int) -> None:
    found.values_a += np.histogram(a[np.isfinite(a)], found.value_edges)[0]
    found.values_b += np.histogram(b[np.isfinite(b)], found.value_edges)[0]
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(difference)
    found.equal += int(alike.sum())
    chosen = difference[finite & ~alike]
    edges = found.difference_edges
    found.differences += np.histogram(np.clip(chosen, edges[0], edges[-1]), edges)[0]
    places = np.arange(at, at + a.size)
    row = places // found.columns * found.heat.shape[0] // found.rows
    column = places % found.columns * found.heat.shape[1] // found.columns
    np.maximum.at(found.heat, (row, column), np.where(finite & ~alike, difference, 0))
    wrong = ~finite & ~alike
    found.broken[row[wrong], column[wrong]] = True
