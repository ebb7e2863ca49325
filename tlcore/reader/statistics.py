"""The statistics of a stored tensor, computed with all of the machine and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from ..statistics import Statistics as Statistics

_CHUNK = 1 << 22


def summarize(tensor: torch.Tensor) -> Statistics:
    """The statistics of a tensor of any dtype, shape and device."""
    flat = tensor.detach().reshape(-1)
    return summarize_pieces(lambda: (flat[at : at + _CHUNK] for at in range(0, flat.numel(), _CHUNK)))


def summarize_pieces(pieces: Callable[[], Iterable[torch.Tensor]]) -> Statistics:
    """The statistics of a tensor whose flat values come in pieces; ``pieces`` is called twice."""
    zeros = nans = infs = finite = 0
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    for values in map(_wide, pieces()):
        zeros += int((values == 0).sum())
        usable = values.isfinite()
        if not bool(usable.all()):
            nans += int(values.isnan().sum())
            infs += int(values.isinf().sum())
            values = values[usable]
        if values.numel():
            finite += values.numel()
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            total += float(values.sum())
            squares += float((values * values).sum())
    if not finite:
        return Statistics(None, None, None, None, None, nans + infs, zeros, nans, infs)
    mean = total / finite
    # A second pass, since the difference of two large sums would lose the small spread around a large mean.
    spread = sum(float((values[values.isfinite()] - mean).square().sum()) for values in map(_wide, pieces()))
    std, l2 = math.sqrt(spread / finite), math.sqrt(squares)
    return Statistics(low, high, mean, std, l2, finite + nans + infs, zeros, nans, infs)


def _wide(part: torch.Tensor) -> torch.Tensor:
    """Values as float64; of complex ones, the magnitudes."""
    return part.to(torch.complex128).abs() if part.is_complex() else part.to(torch.float64)
