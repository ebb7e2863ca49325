"""Where a tensor's largest difference is, and how its differences are spread, in words."""

from __future__ import annotations

from ..results import TensorResult


def closeness(result: TensorResult) -> list[str]:
    """Lines about one result; none where its values were not measured."""
    found = result.measures
    lines = [result.reason] if result.reason and result.status == "different" else []
    if found is not None and found.largest_at is not None and found.largest is not None:
        place = ", ".join(map(str, found.largest_at))
        token = "" if result.first_position is None else f" (position {_position(result)} of the request)"
        sizes = " in magnitude" if "complex" in f"{result.dtypes}" else ""
        lines.append(f"largest difference: at [{place}]{token}, {_apart(*found.largest)}{sizes}")
    if result.details is not None:
        lines.append(str(result.details))
    return lines


def _apart(mine: float, other: float) -> str:
    """Two values with as many digits as tell them apart."""
    for form in (".6g", ".9g", ".17g"):
        texts = [str(each) if isinstance(each, int) else format(each, form) for each in (mine, other)]
        if texts[0] != texts[1]:
            break
    return " against ".join(texts)


def _position(result: TensorResult) -> int:
    """Rows of a request come first in their tensor."""
    assert result.measures is not None and result.measures.largest_at is not None
    return (result.first_position or 0) + (result.measures.largest_at[:1] or (0,))[0]
