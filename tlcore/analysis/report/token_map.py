"""The map of a comparison: how far apart each module's output is at each token, as bytes for a picture."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
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

Doubles = npt.NDArray[np.float64]
Cells = npt.NDArray[np.uint8]
# A byte: equal, 14 decades of size, in one run alone not finite, not compared.
EQUAL, LEAST, MOST, BROKEN, UNKNOWN = 0, 1, 250, 254, 255
_LOW, _DECADES = -10.0, 14.0
_MOST_COLUMNS, _MOST_MAPS = 256, 32
# What is read again for the picture; beyond that a tensor has one colour.
_READ_BYTES = 1 << 30


def maps(comparison: Comparison) -> list[dict[str, Any]]:
    """One map for each step and request, in order: modules down, tokens (or rows) across.

    Cells are in units of noise where the comparison has noise, else relative to the row's norm.
    """
    if comparison.origin is None:
        return []
    first = comparison.first_divergence
    groups: dict[tuple[int, str | None], list[int]] = {}
    for at, _ in enumerate(comparison.origin.pairs):
        result = comparison.results[at]
        if result.measures is not None and (result.direction == "outputs" or _is(first, result)):
            groups.setdefault((result.step, result.request), []).append(at)
    left, found = _READ_BYTES, []
    chosen = _chosen(list(groups), None if first is None else (first.result.step, first.result.request))
    for (step, request), places in ((key, groups[key]) for key in chosen):
        lines = []
        for at in places:
            result = comparison.results[at]
            size = prod(result.shapes[0] or ()) * 4
            cells = _line(comparison, at, size <= left)
            left -= 0 if result.measures is None or result.measures.bitwise else size
            lines.append((result, cells))
        found.append(_packed(step, request, lines, first))
    return found


def _is(first: Any, result: TensorResult) -> bool:
    return first is not None and first.result is result


def _chosen(
    keys: list[tuple[int, str | None]], first: tuple[int, str | None] | None
) -> list[tuple[int, str | None]]:
    """The first maps, and among them that of the first divergence."""
    kept = keys[:_MOST_MAPS]
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
            sides = [np.abs(each.to(torch.complex128).numpy()) for each in (a, b)] if a.is_complex() else None
            one, two = sides or [each.to(torch.float64).numpy() for each in (a, b)]
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


def quantised(errors: Doubles) -> Cells:
    """Sizes as bytes on a logarithmic scale, at most `_MOST_COLUMNS`: of several rows the largest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (np.log10(errors) - _LOW) / _DECADES * (MOST - LEAST) + LEAST
    cells = np.clip(np.nan_to_num(scaled, nan=0, posinf=MOST, neginf=LEAST), LEAST, MOST).astype(np.uint8)
    cells = np.where(errors == 0, EQUAL, np.where(np.isnan(errors), BROKEN, cells)).astype(np.uint8)
    return cells if len(cells) <= _MOST_COLUMNS else _binned(cells, _MOST_COLUMNS)


def _binned(cells: Cells, columns: int) -> Cells:
    starts = np.arange(columns) * len(cells) // columns
    return np.maximum.reduceat(cells, starts)


def _packed(
    step: int, request: str | None, lines: Sequence[tuple[TensorResult, Cells]], first: Any
) -> dict[str, Any]:
    columns = min(_MOST_COLUMNS, max(len(cells) for _, cells in lines))
    field = np.full((len(lines), columns), UNKNOWN, np.uint8)
    for row, (_, cells) in zip(field, lines, strict=True):
        row[: min(columns, len(cells))] = cells if len(cells) <= columns else _binned(cells, columns)
    positions = [result.first_position for result, _ in lines if result.first_position is not None]
    name = f"step {step}" + ("" if request is None else f", request {request}")
    return {
        "name": name,
        "columns": columns,
        "unit": "position" if positions else "row",
        "first": min(positions, default=0),
        "modules": [_named(result) for result, _ in lines],
        "marked": next((at for at, (result, _) in enumerate(lines) if _is(first, result)), None),
        "cells": base64.b64encode(field.tobytes()).decode("ascii"),
    }


def _named(result: TensorResult) -> str:
    path = "".join(f"[{key}]" for key in result.path)
    return f"{call_name(result.module, result.call)} {result.direction}{path}"
