"""Summary statistics of a tensor: what they are, and how those of its pieces are put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

from ..layout.templates import compact

# The columns of a piece's moments, in float64. `mean` and `spread` (the sum of squared distances from
# the mean) are those of the finite values divided by `scale`.
MOMENTS = ("finite", "low", "high", "scale", "mean", "spread", "zeros", "nans", "infs")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics over the finite values in float64; ``None`` where there is no finite value.

    ``std`` is that of the population. Of a complex tensor, all are those of the magnitudes. ``hash`` is
    equal for two tensors whose dtype, shape and bytes are equal; None where it was not computed.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    l2: float | None
    numel: int
    zeros: int
    nans: int
    infs: int
    hash: str | None = None

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return self.nans + self.infs

    def texts(self) -> list[str]:
        """The values of `KEYS` as JSON texts; ``null`` for what float64 cannot express."""
        return [compact(value if _expressible(value) else None) for value in astuple(self)]


KEYS = tuple(field.name for field in fields(Statistics))
# Fewer pieces are put together as fast without arrays.
_FEW = 16


def _expressible(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def combine(pieces: Iterable[Sequence[float]], numel: int, digest: str | None) -> Statistics:
    """The statistics of a tensor of ``numel`` elements from the `MOMENTS` of its pieces."""
    rows = list(pieces)
    zeros, nans, infs = (int(sum(row[column] for row in rows)) for column in (6, 7, 8))
    rows = [row for row in rows if row[0]]
    if len(rows) > _FEW:
        rows = [_merged(np.array(rows))]
    if not rows:
        return Statistics(None, None, None, None, None, numel, zeros, nans, infs, digest)
    low, high = min(row[1] for row in rows), max(row[2] for row in rows)
    # In units of the largest value nothing overflows, whatever the values are.
    unit = max(abs(low), abs(high)) or 1.0
    count = sum(row[0] for row in rows)
    scaled = [(row[0], row[4] * (row[3] / unit), row[5] * (row[3] / unit) ** 2) for row in rows]
    mean = math.fsum(finite * each for finite, each, _ in scaled) / count
    spread = math.fsum(around + finite * (each - mean) ** 2 for finite, each, around in scaled)
    std, l2 = math.sqrt(spread / count), math.sqrt(spread + count * mean**2)
    return Statistics(
        low, high, _within(mean * unit, low, high), std * unit, l2 * unit, numel, zeros, nans, infs, digest
    )


def _merged(rows: npt.NDArray[np.float64]) -> list[float]:
    """The `MOMENTS` of pieces that all have finite values, as one piece's; what is counted, left at 0."""
    finite, low, high = rows[:, 0], float(rows[:, 1].min()), float(rows[:, 2].max())
    unit = max(abs(low), abs(high)) or 1.0
    share = rows[:, 3] / unit
    means = rows[:, 4] * share
    count = float(finite.sum())
    mean = math.fsum(finite * means) / count
    spread = math.fsum(rows[:, 5] * share**2 + finite * (means - mean) ** 2)
    return [count, low, high, unit, mean, spread, 0.0, 0.0, 0.0]


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
