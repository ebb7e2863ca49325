"""Summary statistics of a tensor, exact enough to compare and bounded in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics over the finite values in float64; ``None`` where there is no finite value.

    ``std`` is that of the population. Of a complex tensor, all are those of the magnitudes.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    l2: float | None
    zeros: int
    nans: int
    infs: int


def summarize(tensor: torch.Tensor) -> Statistics:
    """The statistics of a tensor of any dtype, shape and device."""
    zeros = nans = infs = finite = 0
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    for values in _chunks(tensor):
        zeros += int((values == 0).sum())
        nans += int(values.isnan().sum())
        infs += int(values.isinf().sum())
        values = values[values.isfinite()]
        if values.numel():
            finite += values.numel()
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            total += float(values.sum())
            squares += float((values * values).sum())
    if not finite:
        return Statistics(None, None, None, None, None, zeros, nans, infs)
    mean = total / finite
    # A second pass, since the difference of two large sums would lose the small spread around a large mean.
    spread = sum(float((values[values.isfinite()] - mean).square().sum()) for values in _chunks(tensor))
    return Statistics(low, high, mean, math.sqrt(spread / finite), math.sqrt(squares), zeros, nans, infs)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values as flat float64 tensors, a bounded number at a time."""
    flat = tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        yield part.to(torch.complex128).abs() if part.is_complex() else part.to(torch.float64)
