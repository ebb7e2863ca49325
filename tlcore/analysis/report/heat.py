"""Where one tensor differs: its rows down and its last dimension across, told like the map of modules."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .frame import embedded
from .sample import Sample
from .token_map import BROKEN, EQUAL, LEAST, MOST, encoded

# Sizes are told over so many decades, and have colours of their own in the upper ones.
_DECADES, _COLOURED = 6.0, 3.0
# The height of a row, and how much of the axis a number takes.
_HEIGHT, _LABEL = 4, 40


def heat(sample: Sample, name: str) -> str:
    """The picture; its axes count rows and columns, which are whole numbers. ``name`` is the element's."""
    known = sample.heat[np.isfinite(sample.heat)]
    top = float(known.max(initial=0.0))
    colours = f"; colours from {top * 10**-_COLOURED:.2g} to {top:.2g}" if top else ""
    return f"""<div><div class="hint">where: largest |A - B| of rows and last dimension{colours}</div>
<div class="grid"><div class="scroll"><div><canvas class="heat" id="{name}" tabindex="0" role="img"
aria-label="map of differences by row and column"></canvas></div></div></div>
<div class="told" id="{name}-told" aria-live="polite"></div>
{embedded(f"{name}-data", _data(sample, top))}</div>"""


def _data(sample: Sample, top: float) -> dict[str, Any]:
    highest = math.log10(top) if top else 0.0
    low = highest - _DECADES
    height, width = sample.heat.shape
    lines = [*_starts(sample.rows, height), sample.rows]
    found: dict[str, Any] = {
        "rows": [_range(begin, end) for begin, end in pairwise(lines)],
        "line": "row",
        "unit": "column",
        "columns": width,
        "first": 0,
        "marked": None,
        "cells": encoded(_cells(sample, low)),
        "scale": {
            **{
                "low": low,
                "decades": _DECADES,
                "from": highest - _COLOURED,
                "to": highest,
                "unit": "apart",
                "exact": True,
            },
            "words": {"broken": "NaN or Inf in one run alone"},
        },
        "height": max(_HEIGHT, min(14, 256 // max(height, 1))),
        "label": _LABEL,
    }
    if width < sample.columns:
        found |= {"starts": _starts(sample.columns, width), "end": sample.columns}
    return found


def _cells(sample: Sample, low: float) -> npt.NDArray[np.uint8]:
    with np.errstate(divide="ignore"):
        scaled = (np.log10(sample.heat) - low) / _DECADES * (MOST - LEAST) + LEAST
    cells = np.where(sample.heat > 0, np.clip(np.nan_to_num(scaled, neginf=0), LEAST, MOST), EQUAL)
    return np.where(sample.broken, BROKEN, np.rint(cells)).astype(np.uint8)


def _starts(count: int, parts: int) -> list[int]:
    """The first of what shares each cell."""
    return [-(-part * count // parts) for part in range(parts)]


def _range(begin: int, end: int) -> str:
    return str(begin) if end - begin <= 1 else f"{begin} to {end - 1}"
