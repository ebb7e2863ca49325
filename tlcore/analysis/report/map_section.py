"""The map as a part of the page: a canvas that is told by keyboard and pointer alike, and its legend."""

from __future__ import annotations

from math import log10
from typing import Any

from ..results import Comparison
from .assets import asset
from .frame import embedded, section
from .token_map import DECADES, LOW, MOST_MAPS, maps
from .tokens import Decoder

Scale = dict[str, Any]
_STRIP = '<div id="steps" role="listbox" tabindex="0" aria-label="steps and requests at a glance"></div>'
_SIZES = ((1e-6, "1e-6"), (1e-4, "1e-4"), (1e-2, "0.01"), (1.0, "1"))
_UNITS = ((1.0, "1"), (3.0, "3"), (10.0, "10"), (18.0, "18"))


def map_section(comparison: Comparison, tokenizer: Decoder | None = None) -> str:
    """The section; nothing where no values were measured. A tokenizer's texts stand along the tokens."""
    found, count = maps(comparison, tokenizer)
    if not found:
        return ""
    scale = scale_of(comparison)
    unit = "in units of noise" if comparison.noise is not None else "relative to each row's norm"
    hint = (
        f"How far apart each module's outputs are at each token, {unit}; modules in order of return."
        " The frame is the first divergence. Arrow keys and the pointer read cells; Enter or a click finds"
        " the module in the table."
    )
    if tokenizer is not None and not any("texts" in each for each in found):
        hint += " These runs have no token ids of requests, so that there are no texts of tokens."
    if count > len(found):
        hint += f" Of {count} steps and requests, {MOST_MAPS} are here; --steps and --request choose others."
    content = f"""<div class="bar"><select id="which" aria-label="step and request"></select>
<button id="goto" type="button">first divergence</button>{_legend(comparison)}</div>
{_STRIP if len(found) > 1 else ""}<div id="cell" class="told" aria-live="polite"></div>
<div class="grid"><div class="scroll"><div><canvas id="map" tabindex="0" role="img"
aria-label="map of errors by module and token"></canvas></div></div></div>
{embedded("maps", {"scale": scale, "maps": found})}<script>{asset("map.js")}</script>"""
    return section("Map: modules and tokens", hint, content)


def scale_of(comparison: Comparison) -> Scale:
    """What the bytes of a comparison's cells mean, and the sizes between which their colours change."""
    noise = comparison.noise is not None
    # Of noise the middle colour is three times it, else one is for two decades.
    ends = {"from": -0.3, "to": 1.26} if noise else {"from": -8.0, "to": 0.0}
    return {
        "low": LOW,
        "decades": DECADES,
        "unit": "times the noise" if noise else "relative error",
        **ends,
    }


def _legend(comparison: Comparison) -> str:
    sizes = _SIZES if comparison.noise is None else _UNITS
    marks = [(0, "equal"), *((_byte(size), label) for size, label in sizes), (254, "NaN"), (255, "none")]
    shown = "".join(f'<i data-byte="{byte}"></i>{label}' for byte, label in marks)
    return f'<span class="legend" id="map-legend">{shown}</span>'


def _byte(size: float) -> int:
    return round((log10(size) - LOW) / DECADES * 249) + 1
