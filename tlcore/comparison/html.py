"""A comparison as one self-contained HTML page: the verdict, the error by tensor, a filterable table."""

from __future__ import annotations

import io
import math
from html import escape
from textwrap import shorten

from ..errors import BackendError
from .results import Comparison
from .text import COLUMNS, rows, verdict

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dde3ea; --bad: #c0392b;
  --good: #1e7d4f }
* { box-sizing: border-box } body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1200px; margin: 0 auto; padding: 28px 24px 60px } h1 { font-size: 24px; margin: 0 0 4px }
h2 { font-size: 17px; margin: 0 0 10px } .runs { color: var(--soft); font-size: 13px; word-break: break-all }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; overflow-x: auto } .verdict { border-left: 6px solid var(--good) }
.verdict.differs { border-left-color: var(--bad) } .verdict p { margin: 2px 0; color: var(--soft) }
.verdict p:first-child { font-size: 18px; font-weight: 600; color: var(--ink) }
svg { width: 100%; height: auto }
input { font: inherit; padding: 6px 10px; width: 320px; border: 1px solid var(--line); border-radius: 6px }
label { margin-left: 14px } table { border-collapse: collapse; width: 100%; margin-top: 12px;
  font-size: 13px }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
.different, .missing, .unreadable { color: var(--bad); font-weight: 600 }
.bitwise, .close { color: var(--good) }
"""
_SCRIPT = """
const text = document.getElementById("filter"), only = document.getElementById("only");
const lines = [...document.querySelectorAll("tbody tr")];
function show() {
  const wanted = text.value.toLowerCase();
  for (const line of lines) {
    const fits = line.textContent.toLowerCase().includes(wanted);
    line.hidden = !fits || (only.checked && line.dataset.agrees === "1");
  }
}
text.addEventListener("input", show); only.addEventListener("change", show); show();
"""


def page(comparison: Comparison) -> str:
    """The page. Raises BackendError without matplotlib, which the extra ``report`` brings."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict(comparison))
    state = "agrees" if comparison.equal else "differs"
    checked = "" if comparison.equal else " checked"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tlcore: two runs compared</title><style>{_STYLE}</style></head><body><main>
<h1>Two runs compared</h1>
<div class="runs">A: {escape(comparison.a)}<br>B: {escape(comparison.b)}</div>
<section class="verdict {state}">{lines}</section>
<section><h2>Error in order of execution</h2>{_chart(comparison)}</section>
<section><h2>Tensors</h2><input id="filter" type="search" placeholder="filter by module, status, ...">
<label><input id="only" type="checkbox" style="width:auto"{checked}> only what does not agree</label>
{_table(comparison)}</section></main><script>{_SCRIPT}</script></body></html>
"""


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = []
    for result, cells in zip(comparison.results, rows(comparison.results), strict=True):
        marks = "".join(
            f'<td class="{result.status}">{escape(cell)}</td>' if place == 3 else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(cells)
        )
        body.append(f'<tr data-agrees="{int(result.agrees)}">{marks}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _chart(comparison: Comparison) -> str:
    """The relative error of every measured output, logarithmic; exact equality lies on the floor."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise BackendError("the HTML report needs matplotlib: pip install 'tlcore[report]'") from error
    measured = [result for result in comparison.results if result.measures and result.direction == "outputs"]
    if not measured:
        return "<p>No output could be measured in both runs.</p>"
    errors = [_error(result.measures.rel_l2) for result in measured if result.measures]
    positive = [error for error in errors if error > 0]
    floor = max(1e-300, 10 ** math.floor(math.log10(min(positive)) - 1)) if positive else 1e-9
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(errors)), [max(error, floor) for error in errors], color="#8a97a8", linewidth=1)
    for agrees, color, label in ((True, "#1e7d4f", "agrees"), (False, "#c0392b", "differs")):
        chosen = [place for place, result in enumerate(measured) if result.agrees is agrees]
        axes.scatter(chosen, [max(errors[place], floor) for place in chosen], s=14, color=color, label=label)
    first = comparison.first_divergence
    if first is not None and first.result in measured:
        place = measured.index(first.result)
        axes.axvline(place, color="#c0392b", linestyle="--", linewidth=1)
        right = place > len(measured) * 0.6
        axes.annotate(
            shorten(first.module, 80, placeholder="..."),
            (place, 0.94),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if right else 6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color="#c0392b",
            parse_math=False,
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("module outputs in order of return")
    axes.set_ylabel("relative L2 error")
    axes.grid(axis="y", color="#e6ebf0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _error(value: float | None) -> float:
    """A relative error that can be drawn: 1 where it is undefined."""
    return value if value is not None and math.isfinite(value) else 1.0
