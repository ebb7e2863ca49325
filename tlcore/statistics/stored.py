"""The statistics of a stored tensor, computed with all of the machine and in bounded memory."""

from __future__ import annotations

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
