"""The charts of the reports, drawn by matplotlib as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ...errors import BackendError

if TYPE_CHECKING:
    from .sample import Sample

# What matplotlib draws in these colours becomes the page's own, which a dark page has otherwise.
A_COLOR, B_COLOR, BAD, GOOD, SOFT = "#2b6cb1", "#b86a0a", "#b3261f", "#1a7047", "#718097"
_LINE = "#d5dce5"
_OF_PAGE = {
    **{A_COLOR: "var(--a)", B_COLOR: "var(--b)", BAD: "var(--bad)", GOOD: "var(--good)", SOFT: "var(--mid)"},
    **{"#000000": "var(--ink)", _LINE: "var(--line)"},
}
# Points beyond this many become an image inside the SVG.
_MOST_POINTS = 3000


def _figure(width: float, height: float) -> Any:
    """A new figure. Raises BackendError without matplotlib, which the extra ``report`` brings."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError("the HTML report needs matplotlib: pip install 'tlcore[report]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _svg(figure: Any) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, facecolor="none")
    text = drawn.getvalue()
    for colour, name in _OF_PAGE.items():
        text = text.replace(colour, name)
    return text[text.index("<svg") :]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_visible(False)
    axes.tick_params(labelsize=8)


def in_order(
    values: Sequence[float],
    marked: Sequence[bool],
    labels: tuple[str, str],
    highlight: tuple[int, str] | None,
    y_label: str,
    x_label: str,
) -> str:
    """Values in order of execution on a logarithmic axis; zeros lie on a floor that is labelled so."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(11, 3.6)
    axes = figure.subplots()
    positive = [value for value in values if value > 0]
    floor = max(1e-300, 10 ** math.floor(math.log10(min(positive)) - 1)) if positive else 1e-9
    heights = [max(value, floor) for value in values]
    many = len(values) > _MOST_POINTS
    axes.plot(range(len(heights)), heights, color=SOFT, linewidth=0.8, rasterized=many)
    for mark, color, label in ((False, GOOD, labels[0]), (True, BAD, labels[1])):
        chosen = [place for place, each in enumerate(marked) if each is mark]
        heights_of = [heights[place] for place in chosen]
        axes.scatter(chosen, heights_of, s=12, color=color, label=label, zorder=3, rasterized=many)
    if highlight is not None:
        _point_out(axes, *highlight, len(values))
    axes.set_yscale("log")
    if positive:
        axes.set_ylim(floor / 2, max(positive) * 30)
        axes.text(0.004, floor, "0", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.grid(axis="y", color=_LINE)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
    return _svg(figure)


def _point_out(axes: Any, place: int, label: str, count: int) -> None:
    axes.axvline(place, color=BAD, linestyle="--", linewidth=1)
    right = place > count * 0.6
    axes.annotate(
        shorten(label, 80, placeholder="..."),
        (place, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if right else 6, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        color=BAD,
        fontsize=9,
        parse_math=False,
    )


def histograms(sample: Sample) -> str:
    """One pair of tensors: histograms of the values and of their differences."""
    figure = _figure(6.4, 3.3)
    values, differences = figure.subplots(1, 2)
    for counts, color, label in ((sample.values_a, A_COLOR, "A"), (sample.values_b, B_COLOR, "B")):
        values.stairs(counts, sample.value_edges, color=color, label=label, fill=True, alpha=0.25)
        values.stairs(counts, sample.value_edges, color=color, linewidth=1)
    values.set_yscale("symlog", linthresh=1)
    values.set_ylim(bottom=0)
    values.set_title("values", fontsize=9, loc="left")
    values.legend(frameon=False, fontsize=8)
    differences.stairs(sample.differences, sample.difference_edges, fill=True, color=BAD, alpha=0.75)
    differences.set_xscale("log")
    differences.set_title(f"|A - B|; {sample.equal:.1%} are equal", fontsize=9, loc="left")
    differences.set_xlabel("difference", fontsize=8)
    for axes in (values, differences):
        axes.set_ylabel("values", fontsize=8)
        _plain(axes)
    return _svg(figure)
