"""The table of a tensor's channels: in host memory on the calling thread alone, or on its own device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .channels import COLUMNS, Table, add, empty, table_of

# Values that are looked at at a time, and fewer than PyTorch shares among its threads, which the model needs.
_PIECE = 1 << 17
_ALONE = 1 << 15
_DEVICE_PIECE = 1 << 21


def has_channels(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether such a tensor has statistics for each channel: one of real numbers, with a last dimension."""
    return dtype.is_floating_point and len(shape) > 0 and shape[-1] > 0


def vector_numel(shape: Sequence[int]) -> int:
    """How many int64 elements the vector of `measure` has."""
    return len(COLUMNS) * shape[-1]


def from_vector(vector: memoryview | bytes, shape: Sequence[int]) -> Table:
    """The table that a vector's bytes stand for."""
    found: Table = np.frombuffer(vector, dtype=np.float64).reshape(len(COLUMNS), shape[-1]).copy()
    return found


class HostChannels:
    """Computes tables in a buffer of its own; used by one thread at a time."""

    def __init__(self) -> None:
        self._wide = torch.empty(0, dtype=torch.float64)

    def table(self, data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Table:
        """The table of a tensor given as its bytes (uint8, flat, contiguous, aligned to 8)."""
        channels = shape[-1]
        found = empty(channels)
        if not data.numel():
            return found
        flat = data.view(dtype)
        at_once = max(1, _PIECE // channels) * channels
        if self._wide.numel() < at_once:
            with torch.inference_mode(False):
                self._wide = torch.empty(at_once, dtype=torch.float64)
        for begin in range(0, flat.numel(), at_once):
            piece = flat[begin : begin + at_once]
            for first in range(0, piece.numel(), _ALONE):
                part = piece[first : first + _ALONE]
                self._wide[first : first + part.numel()].copy_(part)
            add(found, table_of(self._wide[: piece.numel()].numpy().reshape(-1, channels)))
        return found


def measure(tensor: torch.Tensor) -> torch.Tensor:
    """The vector (int64, on the tensor's device) of a tensor's table; nothing here makes the host wait."""
    with torch.no_grad():
        channels = tensor.shape[-1]
        rows = tensor.detach().reshape(-1, channels)
        at_once = max(1, _DEVICE_PIECE // channels)
        found: list[torch.Tensor] | None = None
        for begin in range(0, len(rows), at_once):
            other = _columns(rows[begin : begin + at_once].to(torch.float64))
            found = other if found is None else _merged(found, other)
        if found is None:
            return torch.from_numpy(empty(channels).reshape(-1)).to(tensor.device).view(torch.int64)
        return torch.stack(found).reshape(-1).view(torch.int64)


def _columns(values: torch.Tensor) -> list[torch.Tensor]:
    finite = values.isfinite()
    count = finite.sum(0).to(torch.float64)
    clean = torch.where(finite, values, 0.0)
    mean = (clean / count.clamp(min=1.0)).sum(0)
    m2 = torch.where(finite, clean - mean, 0.0).square().sum(0)
    low = torch.where(finite, values, math.inf).amin(0)
    high = torch.where(finite, values, -math.inf).amax(0)
    zeros = (values == 0).sum(0).to(torch.float64)
    return [count, mean, m2, low, high, zeros, len(values) - count]


def _merged(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor]:
    count = one[0] + other[0]
    share = other[0] / count.clamp(min=1.0)
    apart = other[1] - one[1]
    return [
        count,
        one[1] + apart * share,
        one[2] + other[2] + apart.square() * (one[0] * share),
        torch.minimum(one[3], other[3]),
        torch.maximum(one[4], other[4]),
        one[5] + other[5],
        one[6] + other[6],
    ]
