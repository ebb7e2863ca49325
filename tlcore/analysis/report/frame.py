"""What the reports have in common: the look, the frame of a page, and a table that filters and sorts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dde3ea; --bad: #b3261e;
  --good: #1e7d4f }
* { box-sizing: border-box } body { margin: 0; background: #f3f5f8; color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px } h1 { font-size: 24px; margin: 0 0 4px }
h2 { font-size: 17px; margin: 0 0 4px } h3 { font-size: 14px; margin: 18px 0 2px; word-break: break-all }
.runs, .hint { color: var(--soft); font-size: 13px; word-break: break-all; margin: 0 0 8px }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px } .verdict { border-left: 6px solid var(--good) }
.verdict.bad { border-left-color: var(--bad) } .verdict p { margin: 2px 0; color: var(--soft) }
.verdict p:first-child { font-size: 18px; font-weight: 600; color: var(--ink); overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block } .bar { display: flex; gap: 16px; align-items: center;
  flex-wrap: wrap; margin-top: 8px } #shown { color: var(--soft); font-size: 13px; margin-left: auto }
input[type=search] { font: inherit; padding: 6px 10px; width: 340px; border: 1px solid var(--line);
  border-radius: 6px } .wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin-top: 12px; font-size: 13px }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap }
td:last-child { white-space: normal; min-width: 160px; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 600; cursor: pointer; user-select: none } tbody tr:hover {
  background: #f7f9fb } .number { text-align: right; font-variant-numeric: tabular-nums }
th.up::after { content: " \\2191" } th.down::after { content: " \\2193" }
td.bad { color: var(--bad); font-weight: 600 } td.good { color: var(--good) }
"""
_SCRIPT = """
const LIMIT = 500, table = JSON.parse(document.getElementById("rows").textContent);
const text = document.getElementById("filter"), only = document.getElementById("only");
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
let order = null, down = false;
const numeric = value => { const found = parseFloat(value); return isNaN(found) ? -Infinity : found; };
function compare(a, b) {
  const [x, y] = [a.cells[order], b.cells[order]];
  const by = table.numbers.includes(order) ? numeric(x) - numeric(y) : x.localeCompare(y);
  return down ? -by : by;
}
function show() {
  const wanted = text.value.toLowerCase().split(/\\s+/);
  let fits = table.rows.filter(row => (!only.checked || row.marked)
    && wanted.every(word => row.cells.join(" ").toLowerCase().includes(word)));
  if (order !== null) fits = fits.sort(compare);
  body.replaceChildren(...fits.slice(0, LIMIT).map(row => {
    const line = document.createElement("tr");
    row.cells.forEach((cell, place) => {
      const field = line.insertCell();
      field.textContent = cell;
      if (table.numbers.includes(place)) field.className = "number";
      if (place === table.status) field.classList.add(row.marked ? "bad" : "good");
    });
    return line;
  }));
  const more = fits.length > LIMIT ? `, the first ${LIMIT} shown` : "";
  document.getElementById("shown").textContent = `${fits.length} of ${table.rows.length} tensors${more}`;
}
heads.forEach((head, place) => head.addEventListener("click", () => {
  down = order === place ? !down : table.numbers.includes(place);
  order = place;
  heads.forEach(each => each.classList.remove("up", "down"));
  head.classList.add(down ? "down" : "up");
  show();
}));
text.addEventListener("input", show); only.addEventListener("change", show); show();
"""


def document(title: str, runs: Sequence[str], verdict: Sequence[str], bad: bool, sections: str) -> str:
    """A whole page: headline, the runs, the verdict's lines, then ``sections`` (HTML)."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tlcore: {escape(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
<div class="runs">{"<br>".join(map(escape, runs))}</div>
<section class="verdict{" bad" if bad else ""}">{lines}</section>
{sections}</main><script>{_SCRIPT}</script></body></html>
"""


def section(title: str, hint: str, content: str) -> str:
    """A titled box; nothing where there is no content."""
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{content}</section>\n'


def table(
    columns: Sequence[str],
    rows: Iterable[tuple[Sequence[str], bool]],
    *,
    numbers: Iterable[str],
    status: str,
    only: str,
    checked: bool,
) -> str:
    """The table section: each row is its cells and whether it is marked, which the ``only`` box selects."""
    data = {
        "rows": [{"cells": list(cells), "marked": marked} for cells, marked in rows],
        "numbers": [columns.index(name) for name in numbers],
        "status": columns.index(status),
    }
    # A "</script>" in a module's name must not end the element.
    embedded = json.dumps(data).replace("<", "\\u003c")
    right = set(numbers)
    head = "".join(f'<th class="{"number" if name in right else ""}">{escape(name)}</th>' for name in columns)
    return f"""<section><h2>Tensors</h2>
<div class="bar"><input id="filter" type="search" placeholder="filter, such as: layers.3 outputs">
<label><input id="only" type="checkbox"{" checked" if checked else ""}> {escape(only)}</label>
<span id="shown"></span></div>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody></tbody></table></div>
<script id="rows" type="application/json">{embedded}</script></section>
"""
