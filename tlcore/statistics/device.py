"""The statistics of a tensor on its own device, as one small vector, without making the host wait.

Nothing here looks at a value: every operation is launched on the current stream, in its turn after what
computed the tensor. The vector goes to the host like any captured tensor, and `statistics` reads it there.

It has a row for each piece of the tensor: the piece's `MOMENTS`, then its share of its block's sums. One
kernel writes all rows where Triton can make it for the device (`kernel`), else many operations of torch do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from .fingerprint import BLOCK_WORDS, LANES, WORD_BYTES, digest, keys
from .summary import MOMENTS, Statistics, combine

log = logging.getLogger("tlcore")
# So small that a program has all of a piece's values at hand, and divides the hash's blocks.
PIECE_WORDS = 1 << 12
_PIECE_BYTES = PIECE_WORDS * WORD_BYTES
_PIECES_OF_BLOCK = BLOCK_WORDS // PIECE_WORDS
_COLUMNS = len(MOMENTS) + LANES
# Torch takes memory for intermediate values for at most so many pieces at a time.
_AT_ONCE = 256
# Before torch 2.5 it had no name of its own.
_OUT_OF_MEMORY: type[Exception] = getattr(torch, "OutOfMemoryError", MemoryError)
# The kinds of device for which there is no kernel.
_without_kernel = {"cpu"}


def vector_numel(nbytes: int) -> int:
    """How many int64 elements the vector of such a tensor has."""
    return -(-nbytes // _PIECE_BYTES) * _COLUMNS


def measure(tensor: torch.Tensor) -> torch.Tensor:
    """The vector (int64, on the tensor's device) of a strided tensor of any dtype and shape."""
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if not flat.numel():
            return torch.empty(0, dtype=torch.int64, device=flat.device)
        found = None if flat.device.type in _without_kernel else _by_kernel(flat)
        return _by_torch(flat) if found is None else found


def statistics(
    vector: memoryview | bytes, numel: int, dtype: torch.dtype, shape: Sequence[int]
) -> Statistics:
    """The statistics that a vector's bytes stand for, of a tensor of ``numel`` elements."""
    rows = np.frombuffer(vector, dtype=np.int64).reshape(-1, _COLUMNS)
    moments = rows[:, : len(MOMENTS)].copy().view(np.float64)
    sums = (
        np.add.reduceat(rows[:, len(MOMENTS) :], np.arange(0, len(rows), _PIECES_OF_BLOCK)) if numel else rows
    )
    return combine(moments.tolist(), numel, digest(sums, dtype, shape))


def _by_kernel(flat: torch.Tensor) -> torch.Tensor | None:
    """The vector of a tensor that is not empty, None where no kernel computes it."""
    try:
        from . import kernel

        if flat.dtype not in kernel.DTYPES:
            return None
        return kernel.measure(flat, _keys(flat.device), PIECE_WORDS)
    except _OUT_OF_MEMORY:
        raise
    except Exception as error:
        # Without Triton, without a compiler for what launches kernels, on a device that Triton does not know.
        _without_kernel.add(flat.device.type)
        log.info(
            "statistics on %s take many operations: no kernel, %s: %s",
            flat.device,
            type(error).__name__,
            error,
        )
        return None


def _by_torch(flat: torch.Tensor) -> torch.Tensor:
    """The vector of a tensor that is not empty."""
    data = flat.view(torch.uint8)
    if data.storage_offset() % WORD_BYTES:
        data = data.clone()
    whole = data.numel() // _PIECE_BYTES
    values = _PIECE_BYTES // flat.dtype.itemsize
    parts = []
    for first in range(0, whole, _AT_ONCE):
        last = min(first + _AT_ONCE, whole)
        rows = flat[first * values : last * values].view(-1, values)
        words = data[first * _PIECE_BYTES : last * _PIECE_BYTES].view(torch.int32).view(-1, PIECE_WORDS)
        parts.append(torch.cat((moments_of_rows(rows).view(torch.int64), _lanes(words, first)), dim=1))
    rest = data[whole * _PIECE_BYTES :]
    if rest.numel():
        rest = torch.nn.functional.pad(rest, (0, -rest.numel() % WORD_BYTES))
        row = moments(flat[whole * values :]).view(1, -1).view(torch.int64)
        parts.append(torch.cat((row, _lanes(rest.view(torch.int32).view(1, -1), whole)), dim=1))
    return torch.cat(parts).view(-1)


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


def _lanes(words: torch.Tensor, first: int) -> torch.Tensor:
    """The sums of pieces, ``[pieces, LANES]``; the first of them is a tensor's piece ``first``."""
    factors = _keys(words.device).view(LANES, _PIECES_OF_BLOCK, PIECE_WORDS)[..., : words.shape[1]]
    turns = torch.arange(first, first + len(words), device=words.device) % _PIECES_OF_BLOCK
    return torch.stack([(words * each[turns]).sum(-1) for each in factors], dim=-1)


@cache
def _keys(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(keys()).to(device)
