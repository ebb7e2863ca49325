"""The tree of modules: how many of each one's tensors do not agree, and how far apart the worst is."""

from __future__ import annotations

import math

import numpy as np

from ..results import Comparison, TensorResult
from .assets import asset
from .frame import embedded, section
from .map_section import scale_of
from .token_map import UNKNOWN, quantised


def tree_section(comparison: Comparison) -> str:
    """The section: foldable, with the first divergence a click or a key away."""
    first = comparison.first_divergence
    data = {
        "scale": scale_of(comparison),
        "modules": [[name, *each] for name, each in counted(comparison).items()],
        "first": None if first is None else first.module,
    }
    unit = "in units of noise" if comparison.noise is not None else "relative to the tensor's norm"
    hint = (
        f"Each module's colour is its worst tensor, {unit}, or the worst of those below it. Arrow keys move"
        " and fold, Enter finds the module in the table, F goes to the first divergence from anywhere."
    )
    content = f"""<style>{asset("tree.css")}</style>
<div class="bar"><button id="reveal" type="button">first divergence</button>
<button id="unfold" type="button">unfold all</button>
<button id="foldall" type="button">fold all</button></div>
<div id="node" class="told" aria-live="polite"></div>
<div id="tree" class="tree" tabindex="0" role="tree" aria-label="modules"><div></div></div>
{embedded("modules", data)}<script>{asset("tree.js")}</script>"""
    return section("Modules", hint, content)


def counted(comparison: Comparison) -> dict[str, list[int]]:
    """Of each module the byte of its worst tensor, how many it has, and how many do not agree."""
    found: dict[str, list[int]] = {}
    cells = cells_of(comparison)
    for result, cell in zip(comparison.results, cells, strict=True):
        entry = found.setdefault(result.module, [UNKNOWN, 0, 0])
        if cell != UNKNOWN and (entry[0] == UNKNOWN or cell > entry[0]):
            entry[0] = cell
        entry[1] += 1
        entry[2] += not result.agrees
    return found


def cells_of(comparison: Comparison) -> list[int]:
    """Each result as one byte of the map's scale."""
    sizes = np.array([size_of(result) for result in comparison.results])
    cells = quantised(sizes)
    unknown = [result.measures is None and result.status != "different" for result in comparison.results]
    return [UNKNOWN if lacks else int(cell) for lacks, cell in zip(unknown, cells, strict=True)]


def size_of(result: TensorResult) -> float:
    """How far a tensor is apart, in units of noise where it has noise; NaN where that is no number."""
    found = result.measures
    if found is None:
        return math.nan
    if found.bitwise:
        return 0.0
    if found.nans[0] != found.nans[1] or found.infs[0] != found.infs[1]:
        return math.nan
    if result.noise is not None:
        return result.noise.units
    return math.inf if found.rel_l2 is None else found.rel_l2
