"""Where a tensor's largest difference is, and how its differences are spread, in words."""

from __future__ import annotations

from ..results import TensorResult


def closeness(result: TensorResult) -> list[str]:
    """Lines about one result; none where its values were not measured."""
    found = result.measures
    lines = []
    if found is not None and found.largest_at is not None and found.largest is not None:
        place = ", ".join(map(str, found.largest_at))
        token = "" if result.first_position is None else f" (position {_position(result)} of the request)"
        mine, other = found.largest
        lines.append(f"largest difference: at [{place}]{token}, {mine:.6g} against {other:.6g}")
    if result.details is not None:
        lines.append(str(result.details))
    return lines


def _position(result: TensorResult) -> int:
    """Rows of a request come first in their tensor."""
    assert result.measures is not None and result.measures.largest_at is not None
    return (result.first_position or 0) + (result.measures.largest_at[:1] or (0,))[0]
