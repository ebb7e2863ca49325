"""The statistics of a tensor on its own device, as one small vector, without making the host wait.

Nothing here looks at a value: every operation is launched on the current stream, in its turn after what
computed the tensor. The vector goes to the host like any captured tensor, and `statistics` reads it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from .fingerprint import BLOCK_BYTES, BLOCK_WORDS, LANES, WORD_BYTES, blocks_of, digest, keys
from .summary import MOMENTS, Statistics, combine

# Memory for intermediate values is taken for at most so many elements and blocks at a time.
_PIECE = 1 << 21
_BLOCKS = 32


def vector_numel(tensor_numel: int, nbytes: int) -> int:
    """How many int64 elements the vector of such a tensor has."""
    return -(-tensor_numel // _PIECE) * len(MOMENTS) + blocks_of(nbytes) * LANES


def measure(tensor: torch.Tensor) -> torch.Tensor:
    """The vector (int64, on the tensor's device) of a strided tensor of any dtype and shape."""
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        rows = [moments(flat[at : at + _PIECE]) for at in range(0, flat.numel(), _PIECE)]
        parts = [row.view(torch.int64) for row in rows]
        parts += _sums(flat.view(torch.uint8)) if flat.numel() else []
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=tensor.device)


def statistics(
    vector: memoryview | bytes, numel: int, dtype: torch.dtype, shape: Sequence[int]
) -> Statistics:
    """The statistics that a vector's bytes stand for, of a tensor of ``numel`` elements."""
    values = np.frombuffer(vector, dtype=np.int64)
    pieces = -(-numel // _PIECE)
    moments = values[: pieces * len(MOMENTS)].view(np.float64).reshape(pieces, len(MOMENTS))
    sums = values[moments.size :].reshape(-1, LANES)
    return combine(moments.tolist(), numel, digest(sums, dtype, shape))


def moments(piece: torch.Tensor) -> torch.Tensor:
    """The `MOMENTS` of a piece that is not empty, float64, on its device."""
    return moments_of_rows(piece.reshape(1, -1))[0]


def moments_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """The `MOMENTS` of each row of ``[rows, values]``, neither of which is 0."""
    values = rows.to(torch.complex128).abs() if rows.is_complex() else rows.to(torch.float64)
    finite = values.isfinite()
    count = finite.sum(1)
    low = torch.where(finite, values, math.inf).amin(1)
    high = torch.where(finite, values, -math.inf).amax(1)
    scale = torch.ones_like(low)
    if rows.dtype in (torch.float64, torch.complex128):
        # The squares of the others cannot leave the range of float64.
        largest = torch.maximum(low.abs(), high.abs())
        scale = torch.where(largest.isfinite() & (largest > 0), largest, scale)
    clean = torch.where(finite, values, 0.0) / scale[:, None]
    mean = (clean.sum(1) / count.clamp(min=1)).clamp(low / scale, high / scale)
    spread = torch.where(finite, clean - mean[:, None], 0.0).square().sum(1)
    counts = rows.shape[1] - values.count_nonzero(1), values.isnan().sum(1), values.isinf().sum(1)
    row = (count, low, high, scale, mean, spread, *counts)
    return torch.stack([each.to(torch.float64) for each in row], dim=1)


def _sums(data: torch.Tensor) -> list[torch.Tensor]:
    """For each block of the bytes ``LANES`` sums, one block after the other."""
    if data.storage_offset() % WORD_BYTES:
        data = data.clone()
    whole = data.numel() // BLOCK_BYTES
    found = []
    for first in range(0, whole, _BLOCKS):
        part = data[first * BLOCK_BYTES : min(first + _BLOCKS, whole) * BLOCK_BYTES]
        found.append(_lanes(part.view(torch.int32).view(-1, BLOCK_WORDS)))
    rest = data[whole * BLOCK_BYTES :]
    if rest.numel():
        rest = torch.nn.functional.pad(rest, (0, -rest.numel() % WORD_BYTES))
        found.append(_lanes(rest.view(torch.int32).view(1, -1)))
    return found


def _lanes(words: torch.Tensor) -> torch.Tensor:
    factors = _keys(words.device)[:, : words.shape[1]]
    return torch.stack([(words * each).sum(-1) for each in factors], dim=-1).view(-1)


@cache
def _keys(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(keys()).to(device)
