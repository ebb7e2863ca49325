"""Who made the NaN, as a picture: calls of modules down, steps and ranks across."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ...layout.names import call_name
from ..culprit import Culprit, Look
from .assets import asset
from .frame import embedded, section
from .token_map import BROKEN, EQUAL, UNKNOWN, encoded

# Between equal (finite) and not finite, in the order of the scale: it came in, and went no further.
_ENTERED = 125
_MOST_COLUMNS = 512
_WORDS = {
    "equal": "finite",
    "broken": "NaN or Inf in its outputs",
    str(_ENTERED): "NaN or Inf in its inputs alone",
}


def finite_section(label: str, looks: Sequence[Look], found: Culprit | None) -> str:
    """The section of one run; nothing where all is finite. ``label`` tells the run: A, B, or nothing."""
    columns = sorted({(look.step, look.rank) for look in looks})
    if not any(look.bad and not look.harmless for look in looks):
        return ""
    bad = {(look.step, look.rank) for look in looks if look.bad and not look.harmless}
    # Of many, those from the first that is not finite on.
    begin = columns.index(min(bad)) if len(columns) > _MOST_COLUMNS else 0
    columns = columns[begin : begin + _MOST_COLUMNS]
    name = f"finite-{label or 'run'}"
    whose = f" in run {label}" if label else ""
    hint = (
        f"Each column is a step{' and rank' if _ranks(columns) else ''}, each line a module's call in order"
        f" of return. The frame is the call whose inputs are finite and whose outputs are not{whose}."
    )
    said = str(found or "No call with finite inputs was seen to make them.")
    content = f"""<p class="hint">{escape(said)}</p>
<div id="{name}-told" class="told" aria-live="polite"></div>
<div class="grid"><div class="scroll"><div><canvas class="heat" id="{name}" tabindex="0" role="img"
aria-label="map of NaN and Inf by module, step and rank"></canvas></div></div></div>
{embedded(f"{name}-data", _data(looks, found, columns))}<script>{asset("heat.js")}</script>"""
    return section(f"Who made the NaN{whose}", hint, content)


def _ranks(columns: Sequence[tuple[int, int]]) -> bool:
    return any(rank for _, rank in columns)


def _data(
    looks: Sequence[Look], found: Culprit | None, columns: Sequence[tuple[int, int]]
) -> dict[str, object]:
    rows = {each: at for at, each in enumerate(dict.fromkeys((look.module, look.number) for look in looks))}
    across = {each: at for at, each in enumerate(columns)}
    # One higher than the bytes, so that nothing there is the least.
    cells = np.zeros((len(rows), len(columns)), np.uint8)
    for look in looks:
        column = across.get((look.step, look.rank))
        if column is not None and look.bad is not None:
            bad = look.bad and not look.harmless
            byte = (BROKEN if look.direction == "outputs" else _ENTERED) if bad else EQUAL
            at = rows[look.module, look.number], column
            cells[at] = max(cells[at], byte + 1)
    place = None if found is None else (found.step, found.ranks[0])
    several = _ranks(columns)
    return {
        "rows": [call_name(*each) for each in rows],
        "columns": len(columns),
        "names": [f"{step}/{rank}" if several else str(step) for step, rank in columns],
        "unit": "step/rank" if several else "step",
        "first": 0,
        "marked": None if found is None else rows[found.module, found.call],
        "markedColumn": None if place is None else across.get(place),
        "cells": encoded(np.where(cells == 0, UNKNOWN, cells - 1).astype(np.uint8)),
        "scale": {
            **{"low": 0, "decades": 1, "from": 0, "to": 1, "unit": ""},
            "words": _WORDS,
        },
    }
