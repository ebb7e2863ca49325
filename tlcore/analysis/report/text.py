"""A comparison as rows of text: for a terminal's table and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ...layout.names import call_name, printable
from ..results import Comparison, TensorResult
from .closeness import closeness

COLUMNS = (
    "step",
    "module",
    "direction",
    "status",
    "max abs",
    "max rel",
    "rel L2",
    "cosine",
    "mismatched",
    "why",
)


def verdict(comparison: Comparison) -> list[str]:
    """The lines that stand above the table: where the runs part, the counts, and the notes."""
    first, difference = comparison.first_divergence, comparison.first_difference
    if first is not None:
        lines = [f"first divergence: {first}", *closeness(first.result)]
    elif comparison.equal:
        lines = ["the runs agree"]
    elif any(each.agrees for each in comparison.results):
        lines = ["what both runs have agrees, but tensors are missing"]
    else:
        lines = ["nothing could be compared: tensors are missing or not readable"]
    lines += [f"not compared: {gap}" for gap in comparison.not_compared]
    if difference is not None and (first is None or difference.result is not first.result):
        lines.append(f"first difference in any bit: {difference}")
    if comparison.advice is not None:
        lines.append(comparison.advice)
    lines += [f"{label}: {found}" for label, found in comparison.culprits]
    counted = ", ".join(f"{count} {status}" for status, count in comparison.counts.items() if count)
    return [*lines, f"tensors: {counted}", *_noted(comparison)]


def _noted(comparison: Comparison) -> Iterator[str]:
    gaps = comparison.not_compared
    yield from (f"note: {note}" for note in comparison.notes if note not in gaps)


def shown(comparison: Comparison, verbose: bool) -> list[TensorResult]:
    """All results, or only those that do not agree."""
    return [result for result in comparison.results if verbose or not result.agrees]


def rows(results: Sequence[TensorResult]) -> Iterator[tuple[str, ...]]:
    """The cells of each result, under `COLUMNS`."""
    for result in results:
        module = call_name(result.module, result.call)
        path = "".join(f"[{key}]" for key in result.path)
        position = "" if result.first_position is None else f"@{result.first_position}"
        request = "" if result.request is None else f" {result.request}{position}"
        yield (
            str(result.step),
            module + request,
            result.direction + path,
            result.status,
            *_numbers(result),
            _why(result),
        )


def _numbers(result: TensorResult) -> tuple[str, ...]:
    found = result.measures
    if found is None:
        return ("", "", "", "", "")
    floats = (found.max_abs, found.max_rel, found.rel_l2, found.cosine)
    return (*("-" if each is None else f"{each:.3g}" for each in floats), f"{found.mismatched:.2%}")


def _why(result: TensorResult) -> str:
    parts = [result.reason] if result.reason else []
    if result.dtypes[0] != result.dtypes[1] and None not in result.dtypes:
        parts.append(f"{result.dtypes[0]} against {result.dtypes[1]}")
    if result.measures is not None:
        row = result.measures.worst_row
        if row is not None and result.status == "different":
            parts.append(f"row {row} is off by {result.measures.worst_row_l2:.3g} of a row's norm")
        for what, counts in (("NaN", result.measures.nans), ("Inf", result.measures.infs)):
            if any(counts):
                parts.append(f"{what}: {counts[0]} against {counts[1]}")
    return "; ".join(parts)


def markdown(comparison: Comparison, verbose: bool) -> str:
    """The comparison as a Markdown document."""
    lines = [f"# {comparison.a} against {comparison.b}", ""]
    lines += [f"- {_escaped(line)}" for line in verdict(comparison)]
    results = shown(comparison, verbose)
    if results:
        lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(map(_escaped, cells))} |" for cells in rows(results)]
    return "\n".join(lines) + "\n"


_MARKUP = re.compile(r"([\\`*_{}\[\]<>|&~])")


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(" ".join(text.split())))
