"""The map of a comparison: how far apart each module's output is at each token, as bytes for a picture."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import ReadError
from ...layout.names import call_name
from ..matching.pairs import Pair, Piece
from ..results import Comparison, TensorResult
from ..row_norms import RowNorms
from ..work import Operand, chunks
from .tokens import Decoder, token_texts

Doubles = npt.NDArray[np.float64]
Cells = npt.NDArray[np.uint8]
# A byte: equal, 14 decades of size, in one run alone not finite, not compared.
EQUAL, LEAST, MOST, BROKEN, UNKNOWN = 0, 1, 250, 254, 255
LOW, DECADES = -10.0, 14.0
MOST_MAPS = 64
_MOST_COLUMNS, _LEAST_COLUMNS = 256, 16
_SMALL = (40, 36)
# All maps together: more rows have fewer columns.
_MOST_CELLS = 1 << 23
# What is read again for the picture; beyond that a tensor has one colour.
_READ_BYTES = 1 << 30


def maps(comparison: Comparison, tokenizer: Decoder | None = None) -> tuple[list[dict[str, Any]], int]:
    """One map for each step and request, in order: modules down, tokens (or rows) across; and of how many.

    Cells are in units of noise where the comparison has noise, else relative to the row's norm.
    """
    if comparison.origin is None:
        return [], 0
    first = comparison.first_divergence
    groups: dict[tuple[int, str | None], list[int]] = {}
    for at, _ in enumerate(comparison.origin.pairs):
        result = comparison.results[at]
        if result.measures is not None and (result.direction == "outputs" or _is(first, result)):
            groups.setdefault((result.step, result.request), []).append(at)
    chosen = _chosen(list(groups), None if first is None else (first.result.step, first.result.request))
    rows = sum(len(groups[key]) for key in chosen)
    most = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, _MOST_CELLS // max(rows, 1)))
    texts: dict[str | None, dict[int, str]] = {}
    left, found = _READ_BYTES, []
    for step, request in chosen:
        field = _Field(comparison, groups[step, request], most)
        for at in groups[step, request]:
            result = comparison.results[at]
            size = prod(result.shapes[0] or ()) * 4
            field.put(at, _line(comparison, at, size <= left))
            left -= 0 if result.measures is None or result.measures.bitwise else size
        if tokenizer is not None and request not in texts:
            texts[request] = token_texts(comparison, request, tokenizer)
        found.append(field.packed(step, request, first, texts.get(request, {})))
    return found, len(groups)


class _Field:
    """The cells of one map: a line for each result, with its rows at their positions."""

    def __init__(self, comparison: Comparison, places: Sequence[int], most: int) -> None:
        self._results = {at: comparison.results[at] for at in places}
        assert comparison.origin is not None
        pieces = {at: comparison.origin.pairs[at][1][0] for at in places}
        positions = [
            each.first_position for each in self._results.values() if each.first_position is not None
        ]
        self._first = min(positions, default=0)
        self._unit = "position" if positions else "row"
        ends = [self._begin(at) + _rows(each, pieces[at]) for at, each in self._results.items()]
        self._rows = max(ends)
        self._columns = min(most, self._rows)
        self._lines = {at: line for line, at in enumerate(places)}
        self._cells = np.zeros((len(places), self._columns), np.uint8)

    def _begin(self, at: int) -> int:
        """Where a result's first row stands, counted from the map's first."""
        return (self._results[at].first_position or self._first) - self._first

    def put(self, at: int, cells: Cells) -> None:
        """Take in a result's cells. They are kept one higher: so nothing there is the least, not the most."""
        begin = self._begin(at)
        columns = np.arange(begin, begin + len(cells)) * self._columns // self._rows
        line = self._cells[self._lines[at]]
        np.maximum.at(line, np.minimum(columns, self._columns - 1), cells + np.uint8(1))

    def _small(self) -> tuple[int, int, str]:
        """The map at a glance: how many rows and columns, and the largest of what shares a cell."""
        rows, columns = (min(most, count) for most, count in zip(_SMALL, self._cells.shape, strict=True))
        small = self._cells
        for axis, count in enumerate((rows, columns)):
            starts = np.arange(count) * self._cells.shape[axis] // count
            small = np.maximum.reduceat(small, starts, axis=axis)
        return rows, columns, encoded(small - np.uint8(1))

    def packed(self, step: int, request: str | None, first: Any, texts: Mapping[int, str]) -> dict[str, Any]:
        """What the page's script takes."""
        # The first row of each column.
        starts = (-(-np.arange(self._columns) * self._rows // self._columns) + self._first).tolist()
        found: dict[str, Any] = {
            "name": f"step {step}" + ("" if request is None else f", request {request}"),
            "columns": self._columns,
            "unit": self._unit,
            "first": self._first,
            "rows": [_named(result) for result in self._results.values()],
            "marked": next((self._lines[at] for at, each in self._results.items() if _is(first, each)), None),
            "cells": encoded(self._cells - np.uint8(1)),
            "small": self._small(),
        }
        if self._columns < self._rows:
            found |= {"starts": starts, "end": self._first + self._rows}
        if any(start in texts for start in starts):
            ends = [*starts[1:], self._first + self._rows]
            spans = (range(*each) for each in zip(starts, ends, strict=True))
            found["texts"] = ["".join(texts.get(at, "?") for at in span) for span in spans]
        return found


def _is(first: Any, result: TensorResult) -> bool:
    return first is not None and first.result is result


def _chosen(
    keys: list[tuple[int, str | None]], first: tuple[int, str | None] | None
) -> list[tuple[int, str | None]]:
    """The first maps, and among them that of the first divergence."""
    kept = keys[:MOST_MAPS]
    return kept if first is None or first in kept or first not in keys else [first, *kept[:-1]]


def _line(comparison: Comparison, at: int, read: bool) -> Cells:
    assert comparison.origin is not None
    result, (pair, pieces) = comparison.results[at], comparison.origin.pairs[at]
    measures = result.measures
    rows = _rows(result, pieces[0])
    if measures is None or measures.bitwise:
        return np.full(rows, EQUAL if measures is not None else UNKNOWN, np.uint8)
    try:
        errors = row_errors(comparison, pair, pieces) if read else np.full(rows, measures.rel_l2 or 1.0)
    except ReadError:
        return np.full(rows, UNKNOWN, np.uint8)
    worst = float(np.nanmax(errors, initial=0.0))
    if result.noise is not None and worst and math.isfinite(result.noise.units):
        errors = errors / worst * result.noise.units
    return quantised(errors)


def _rows(result: TensorResult, piece: Piece) -> int:
    if piece.rows is not None:
        return max(1, piece.rows[1] - piece.rows[0])
    shape = result.shapes[0] or ()
    return max(1, prod(shape[:-1]) if len(shape) > 1 else 1)


def row_errors(comparison: Comparison, pair: Pair, pieces: tuple[Piece, Piece]) -> Doubles:
    """How far each row is apart, relative to it; NaN where one run alone is not finite."""
    assert comparison.origin is not None
    with ExitStack() as stack:
        x, y = (
            Operand(run, source, stack, piece.axis)
            for run, source, piece in zip(comparison.origin.runs, (pair.a, pair.b), pieces, strict=True)
        )
        shape = y.cut(pieces[1])[1]
        by_token = pieces[0].rows is not None
        width = prod(shape[1:]) if by_token else (shape[-1] if len(shape) > 1 else prod(shape))
        norms, broken = RowNorms(max(width, 1)), []

        def add(a: torch.Tensor, b: torch.Tensor) -> None:
            wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
            one, two = (each.to(wide).numpy() for each in (a, b))
            finite = np.isfinite(one) & np.isfinite(two)
            alike = finite | (one == two) | (np.isnan(one) & np.isnan(two))
            broken.append(~alike)
            with np.errstate(invalid="ignore"):
                difference = np.where(finite, np.abs(one - two), 0.0)
            norms.add(difference, np.where(finite, np.abs(two), 0.0))

        chunks(x, y, pieces, add)
    errors = norms.relative()
    if broken and (marks := np.concatenate(broken)).any():
        errors[np.unique(np.flatnonzero(marks) // max(width, 1))] = np.nan
    return errors


def encoded(cells: Cells) -> str:
    """Cells as text for the page."""
    return base64.b64encode(cells.tobytes()).decode("ascii")


def quantised(errors: Doubles) -> Cells:
    """Sizes as bytes on a logarithmic scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (np.log10(errors) - LOW) / DECADES * (MOST - LEAST) + LEAST
    cells = np.clip(np.nan_to_num(scaled, nan=0, posinf=MOST, neginf=LEAST), LEAST, MOST).astype(np.uint8)
    return np.where(errors == 0, EQUAL, np.where(np.isnan(errors), BROKEN, cells)).astype(np.uint8)


def _named(result: TensorResult) -> str:
    path = "".join(f"[{key}]" for key in result.path)
    return f"{call_name(result.module, result.call)} {result.direction}{path}"
