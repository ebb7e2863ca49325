"""The statistics of a stored tensor, computed with all of the machine and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .device import moments, moments_of_rows
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
    return [combine([row], numel, None) for row in moments_of_rows(rows).tolist()]
