"""A comparison as one self-contained HTML page: verdict, error by tensor, worst tensors, a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from ...errors import ReadError
from ..results import Comparison, TensorResult, look_at
from .assets import asset
from .charts import histograms, in_order
from .finite_map import finite_section
from .frame import document, section, table
from .heat import heat
from .map_section import map_section
from .module_tree import tree_section
from .sample import sample
from .text import COLUMNS, rows, verdict
from .tokens import Decoder

_NUMBERS = ("step", "max abs", "max rel", "rel L2", "cosine", "mismatched")
_WORST = 4


def page(comparison: Comparison, tokenizer: Decoder | None = None) -> str:
    """The page; with a tokenizer, its texts stand along the map's tokens.

    Raises BackendError without matplotlib, which the extra ``report`` brings.
    """
    lines = zip(rows(comparison.results), (not result.agrees for result in comparison.results), strict=True)
    sections = [
        tree_section(comparison),
        map_section(comparison, tokenizer),
        *_not_finite(comparison),
        section(
            "Error in order of execution",
            "Each point is a module's output; 1 where only one side has a NaN or Inf. The line marks the"
            " first divergence.",
            _errors(comparison),
        ),
        section(
            "Worst tensors",
            "The first divergence, then the largest relative errors of other modules.",
            _pictures(comparison),
        ),
        table(
            COLUMNS,
            lines,
            numbers=_NUMBERS,
            status="status",
            only="only what does not agree",
            checked=not comparison.equal,
        ),
    ]
    runs = [f"A: {comparison.a}", f"B: {comparison.b}"]
    bad = not comparison.equal
    return document("Two runs compared", runs, verdict(comparison), bad, "".join(sections))


def _not_finite(comparison: Comparison) -> Iterator[str]:
    """The picture of each run that holds NaN or infinities where the other differs."""
    for label, found in comparison.culprits:
        side = 0 if label == "A" else 1
        yield finite_section(label, [look_at(each, side) for each in comparison.results], found)


def _errors(comparison: Comparison) -> str:
    measured = [result for result in comparison.results if result.measures and result.direction == "outputs"]
    if not measured:
        return ""
    errors = [_error(result) for result in measured]
    return in_order(
        errors,
        [not result.agrees for result in measured],
        ("agrees", "differs"),
        _highlight(comparison, measured),
        "relative L2 error",
        "module outputs in order of return",
    )


def _highlight(comparison: Comparison, measured: list[TensorResult]) -> tuple[int, str] | None:
    """The first divergence's place among the outputs: its own, or of an input that of the next output."""
    first = comparison.first_divergence
    if first is None:
        return None
    begin = next(place for place, result in enumerate(comparison.results) if result is first.result)
    following = {id(result) for result in comparison.results[begin:]}
    place = next((place for place, result in enumerate(measured) if id(result) in following), None)
    return None if place is None else (place, first.module)


def _error(result: TensorResult) -> float:
    """A relative error that can be drawn: 1 where it is undefined, or what is not finite differs."""
    found = result.measures
    if found is None or found.rel_l2 is None or not math.isfinite(found.rel_l2):
        return 1.0
    special = found.nans[0] != found.nans[1] or found.infs[0] != found.infs[1]
    return 1.0 if special else found.rel_l2


def _pictures(comparison: Comparison) -> str:
    """Histogram and heatmap of the first divergence and of the worst tensors."""
    drawn = []
    for place in _chosen(comparison):
        result = comparison.results[place]
        name = " ".join(cell for cell in next(iter(rows([result])))[1:3])
        title = f"<h3>step {result.step}: {escape(name)}</h3>"
        try:
            assert comparison.origin is not None
            found = sample(comparison.origin.runs, *comparison.origin.pairs[place])
        except ReadError as error:
            drawn.append(f"{title}<p>{escape(str(error))}</p>")
        else:
            drawn.append(
                f'{title}<div class="pair">{histograms(found)}{heat(found, f"heat-{len(drawn)}")}</div>'
            )
    return "".join([*drawn, f"<script>{asset('heat.js')}</script>"]) if drawn else ""


def _chosen(comparison: Comparison) -> list[int]:
    """Places of the results to be pictured: the first divergence, then one a module by relative error."""
    if comparison.origin is None:
        return []
    known = range(len(comparison.origin.pairs))
    measured = [p for p in known if (m := comparison.results[p].measures) is not None and not m.bitwise]
    different = [place for place in measured if not comparison.results[place].agrees]
    chosen = different[:1]
    modules = {comparison.results[place].module for place in chosen}
    for place in sorted(different or measured, key=lambda place: -_error(comparison.results[place])):
        if len(chosen) == _WORST:
            break
        if comparison.results[place].module not in modules:
            chosen.append(place)
            modules.add(comparison.results[place].module)
    return chosen
