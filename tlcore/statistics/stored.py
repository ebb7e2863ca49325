"""The statistics of a stored tensor, computed with all of the machine and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .device import moments
from .summary import Statistics as Statistics
from .summary import combine

_CHUNK = 1 << 22


def summarize(tensor: torch.Tensor) -> Statistics:
    """The statistics of a tensor of any dtype, shape and device."""
    flat = tensor.detach().reshape(-1)
    return summarize_pieces(flat[at : at + _CHUNK] for at in range(0, flat.numel(), _CHUNK))


def summarize_pieces(pieces: Iterable[torch.Tensor]) -> Statistics:
    """The statistics of a tensor whose flat values come in pieces, none of them empty."""
    rows, numel = [], 0
    for piece in pieces:
        rows.append(moments(piece).tolist())
        numel += piece.numel()
    return combine(rows, numel, None)


def summarize_rows(rows: torch.Tensor) -> list[Statistics]:
    """The statistics of each row of ``[rows, values]``, neither of which is 0: those that it has by itself.

    Bit by bit, since along its last dimension torch adds up as it does a whole tensor, as long as both are
    few enough for one thread.
    """
    numel = rows.shape[1]
    return [combine([row], numel, None) for row in _moments(rows).tolist()]


def _moments(rows: torch.Tensor) -> torch.Tensor:
    """`moments` of each row."""
    values = rows.to(torch.complex128).abs() if rows.is_complex() else rows.to(torch.float64)
    finite = values.isfinite()
    count = finite.sum(1)
    low = torch.where(finite, values, math.inf).amin(1)
    high = torch.where(finite, values, -math.inf).amax(1)
    scale = torch.ones_like(low)
    if rows.dtype in (torch.float64, torch.complex128):
        largest = torch.maximum(low.abs(), high.abs())
        scale = torch.where(largest.isfinite() & (largest > 0), largest, scale)
    clean = torch.where(finite, values, 0.0) / scale[:, None]
    mean = (clean.sum(1) / count.clamp(min=1)).clamp(low / scale, high / scale)
    spread = torch.where(finite, clean - mean[:, None], 0.0).square().sum(1)
    counts = rows.shape[1] - values.count_nonzero(1), values.isnan().sum(1), values.isinf().sum(1)
    row = (count, low, high, scale, mean, spread, *counts)
    return torch.stack([each.to(torch.float64) for each in row], dim=1)
