"""A survey as one self-contained HTML page, in the look of a comparison's."""

from __future__ import annotations

from ..stats import Survey
from .charts import in_order
from .finite_map import finite_section
from .frame import document, section, table
from .stats_text import COLUMNS, NUMBERS, noticeable, rows


def survey_page(survey: Survey) -> str:
    """The page. Raises BackendError without matplotlib, which the extra ``report`` brings."""
    marked = [noticeable(tensor) for tensor in survey.tensors]
    bad = any(marked)
    content = (
        finite_section("", survey.looks(), survey.culprit)
        + section(
            "Size of the outputs in order of execution",
            "Root mean square of each module's output, 0 where no value is finite. The line marks the first"
            " NaN or Inf.",
            _sizes(survey),
        )
        + table(
            COLUMNS,
            zip(rows(survey.tensors), marked, strict=True),
            numbers=NUMBERS,
            status="NaN",
            only="only with NaN or Inf, or unreadable",
            checked=bad,
        )
    )
    return document("Statistics of a run", [survey.run], survey.verdict(), bad, content)


def _sizes(survey: Survey) -> str:
    outputs = [tensor for tensor in survey.tensors if tensor.direction == "outputs" and tensor.values]
    if not outputs:
        return ""
    first = survey.first_nan or survey.first_inf
    places = [place for place, tensor in enumerate(outputs) if first and tensor is first.tensor]
    return in_order(
        [_rms(tensor.values.mean, tensor.values.std) for tensor in outputs if tensor.values],
        [noticeable(tensor) for tensor in outputs],
        ("finite", "holds NaN or Inf"),
        (places[0], first.tensor.module) if first and places else None,
        "root mean square",
        "module outputs in order of return",
    )


def _rms(mean: float | None, std: float | None) -> float:
    return float((mean**2 + std**2) ** 0.5) if mean is not None and std is not None else 0.0
