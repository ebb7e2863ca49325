"""What the reports have in common: the look, the frame of a page, and a table that filters and sorts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from .assets import asset


def document(title: str, runs: Sequence[str], verdict: Sequence[str], bad: bool, sections: str) -> str:
    """A whole page: headline, the runs, the verdict's lines, then ``sections`` (HTML)."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tlcore: {escape(title)}</title><style>{asset("page.css")}{asset("grid.css")}</style>
<script>{asset("grid.js")}</script></head><body><main>
<h1>{escape(title)}</h1>
<div class="runs">{"<br>".join(map(escape, runs))}</div>
<section class="verdict{" bad" if bad else ""}">{lines}</section>
{sections}</main><script>{asset("table.js")}</script></body></html>
"""


def section(title: str, hint: str, content: str) -> str:
    """A titled box; nothing where there is no content."""
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{content}</section>\n'


def embedded(name: str, data: object) -> str:
    """Data as an element of the page, which a script finds by its name."""
    # A "</script>" in a module's name must not end the element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script id="{name}" type="application/json">{text}</script>'


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
        "rows": [[*cells, int(marked)] for cells, marked in rows],
        "numbers": [columns.index(name) for name in numbers],
        "status": columns.index(status),
    }
    right = set(numbers)
    head = "".join(
        f'<th scope="col" class="{"number" if name in right else ""}">'
        f'<button type="button">{escape(name)}</button></th>'
        for name in columns
    )
    return f"""<section id="tensors"><h2>Tensors</h2>
<div class="bar"><input id="filter" type="search" aria-label="filter"
placeholder="filter, such as: layers.3 outputs">
<label><input id="only" type="checkbox"{" checked" if checked else ""}> {escape(only)}</label>
<span id="shown"></span></div>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody></tbody></table></div>
{embedded("rows", data)}</section>
"""
