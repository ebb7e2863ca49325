"""The map as a part of the page: a canvas that is told by keyboard and pointer alike, and its legend."""

from __future__ import annotations

import json
from math import log10

from ..results import Comparison
from .frame import section
from .token_map import maps

_STYLE = """<style>
.map { display: flex; gap: 10px; max-height: 560px; overflow: auto; border: 1px solid var(--line) }
.map canvas { display: block; image-rendering: pixelated; cursor: crosshair; outline-offset: -2px }
#cell { font-size: 13px; min-height: 20px; margin: 6px 0; overflow-wrap: anywhere }
.legend { display: inline-flex; align-items: center; gap: 6px; font-size: 12px; color: var(--soft) }
.legend i { width: 14px; height: 14px; border: 1px solid var(--line); display: inline-block }
.bar select, .bar button { font: inherit; padding: 4px 8px }
</style>"""
_SCRIPT = """<script>
(() => {
const data = JSON.parse(document.getElementById("maps").textContent), noise = data.noise;
const canvas = document.getElementById("map"), cell = document.getElementById("cell");
const choice = document.getElementById("which"), go = document.getElementById("goto");
const context = canvas.getContext("2d");
let map = null, cells = null, at = [0, 0], width = 8, height = 8;
const size = byte => 10 ** ((byte - 1) / 249 * 14 - 10);
const stops = [[255, 255, 255], [255, 237, 160], [253, 141, 60], [189, 0, 38], [90, 0, 40]];
// Of noise: white up to once it, orange at three times. Else: by decades from 1e-8 to 1.
const strength = value => noise ? (Math.log10(value) + .3) / .78 * 2 : (Math.log10(value) + 8) / 8 * 4;
function colour(byte) {
  if (byte === 0) return [232, 240, 248];
  if (byte === 254) return [200, 0, 200];
  if (byte === 255) return [205, 210, 216];
  const place = Math.min(3.999, Math.max(0, strength(size(byte)))), low = Math.floor(place);
  return stops[low].map((each, i) => Math.round(each + (stops[low + 1][i] - each) * (place - low)));
}
const table = [...Array(256).keys()].map(colour);
function draw() {
  const rows = map.modules.length, columns = map.columns;
  width = Math.max(3, Math.min(24, Math.floor(1100 / columns)));
  height = rows > 3000 ? 3 : rows > 400 ? 6 : 12;
  const named = height >= 12 ? 420 : 0;
  canvas.width = columns * width + named; canvas.height = rows * height;
  context.font = "10px system-ui, sans-serif"; context.textBaseline = "middle";
  if (named) map.modules.forEach((name, row) => {
    context.fillStyle = row === map.marked ? "#b3261e" : "#5b6675";
    context.fillText(name, columns * width + 8, (row + .5) * height);
  });
  for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
    context.fillStyle = `rgb(${table[cells[row * columns + column]]})`;
    context.fillRect(column * width, row * height, width, height);
  }
  if (map.marked !== null) {
    context.strokeStyle = "#1c2430"; context.lineWidth = 1.5;
    context.strokeRect(.75, map.marked * height + .75, columns * width - 1.5, height - 1.5);
  }
  tell();
}
function tell() {
  const [row, column] = at, byte = cells[row * map.columns + column];
  const what = byte === 0 ? "equal" : byte === 254 ? "NaN or Inf in one run alone" : byte === 255 ?
    "not there" : (byte === 250 ? "at least " : "") + size(byte).toPrecision(2)
    + (noise ? " times the noise" : " relative error");
  cell.textContent = `${map.modules[row]}, ${map.unit} ${map.first + column}: ${what}`;
}
function choose(which) {
  map = data.maps[which];
  cells = Uint8Array.from(atob(map.cells), each => each.charCodeAt(0));
  at = [map.marked === null ? 0 : map.marked, 0]; draw();
}
function move(row, column) {
  at = [Math.min(map.modules.length - 1, Math.max(0, row)), Math.min(map.columns - 1, Math.max(0, column))];
  const box = canvas.parentElement, top = at[0] * height;
  if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - height) box.scrollTop = top - 200;
  tell();
}
const under = event => [Math.floor(event.offsetY / height), Math.floor(event.offsetX / width)];
canvas.addEventListener("mousemove", event => { move(...under(event)); });
function filter() {
  const text = document.getElementById("filter");
  text.value = map.modules[at[0]]; text.dispatchEvent(new Event("input"));
}
canvas.addEventListener("click", event => { move(...under(event)); filter(); });
canvas.addEventListener("keydown", event => {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Enter") filter(); else if (by) move(at[0] + by[0], at[1] + by[1]); else return;
  event.preventDefault();
});
data.maps.forEach((each, place) => choice.add(new Option(each.name, place)));
const marked = data.maps.findIndex(each => each.marked !== null);
choice.addEventListener("change", () => choose(choice.value));
go.disabled = marked < 0;
go.addEventListener("click", () => {
  choice.value = marked; choose(marked); move(map.marked, 0); canvas.focus();
});
choice.value = Math.max(0, marked); choose(Math.max(0, marked));
document.querySelectorAll(".legend i").forEach(each => {
  each.style.background = `rgb(${table[Number(each.dataset.byte)]})`;
});
})();
</script>"""


def map_section(comparison: Comparison) -> str:
    """The section; nothing where no values were measured."""
    found = maps(comparison)
    if not found:
        return ""
    noise = comparison.noise is not None
    embedded = json.dumps({"noise": noise, "maps": found}).replace("<", "\\u003c")
    unit = "in units of noise" if noise else "relative to each row's norm"
    hint = (
        f"How far apart each module's outputs are at each token, {unit}; modules in order of return."
        " The frame is the first divergence. Arrow keys and the pointer read cells; Enter or a click finds"
        " the module in the table."
    )
    content = f"""{_STYLE}<div class="bar"><select id="which" aria-label="step and request"></select>
<button id="goto" type="button">first divergence</button>{_legend(noise)}</div>
<div id="cell" aria-live="polite"></div>
<div class="map"><canvas id="map" tabindex="0" role="img" aria-label="map of errors by module and token">
</canvas></div>
<script id="maps" type="application/json">{embedded}</script>{_SCRIPT}"""
    # The script looks for the table, which comes later, only when it is used.
    return section("Map: modules and tokens", hint, content)


def _legend(noise: bool) -> str:
    sizes = ((1.0, "1"), (3.0, "3"), (10.0, "10"), (100.0, "100")) if noise else _DECADES
    marks = [(0, "equal"), *((_byte(size), label) for size, label in sizes), (254, "NaN"), (255, "none")]
    return "".join(f'<span class="legend"><i data-byte="{byte}"></i>{label}</span>' for byte, label in marks)


_DECADES = ((1e-6, "1e-6"), (1e-4, "1e-4"), (1e-2, "0.01"), (1.0, "1"))


def _byte(size: float) -> int:
    return round((log10(size) + 10) / 14 * 249) + 1
