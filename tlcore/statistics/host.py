"""The statistics of a tensor in host memory, computed on the calling thread alone.

PyTorch would share the work among its threads, which the model needs. NumPy keeps to one, and its calls
on pieces of this size leave the interpreter to others almost all of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .fingerprint import BLOCK_WORDS, LANES, WORD_BYTES, Ints, blocks_of, digest, keys
from .summary import Statistics, combine

_PIECE = 1 << 17
# PyTorch works on fewer elements than these on one thread.
_ALONE = 1 << 15
Floats = npt.NDArray[np.float64]


class HostStatistics:
    """Computes statistics in buffers of its own; used by one thread at a time."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self._wide = torch.empty(_PIECE, dtype=torch.float64)
        self._values: Floats = self._wide.numpy()
        self._words: Ints = np.empty(BLOCK_WORDS, dtype=np.int64)
        self._products: Ints = np.empty(BLOCK_WORDS, dtype=np.int64)

    def statistics(self, data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Statistics:
        """The statistics of a tensor given as its bytes (uint8, flat, contiguous, aligned to 8).

        Raises what torch raises for a dtype that has no values of its own, such as packed ones.
        """
        flat = data.view(dtype) if data.numel() else data.new_empty(0, dtype=dtype)
        with np.errstate(all="ignore"):
            pieces = [_moments(values, dtype) for values in self._pieces(flat)]
            found = digest(self._sums(data.numpy()), dtype, shape)
        return combine(pieces, flat.numel(), found)

    def has_nonfinite(
        self, data: torch.Tensor, dtype: torch.dtype, besides_minus_infinity: bool = False
    ) -> bool:
        """Whether a tensor, given as its bytes, holds a NaN or an infinity, perhaps other than -inf."""
        if not (dtype.is_floating_point or dtype.is_complex) or not data.numel():
            return False
        return any(
            not (math.isfinite(low := float(values.min())) or (besides_minus_infinity and low == -math.inf))
            or values.max() == math.inf
            for values in self._pieces(data.view(dtype))
        )

    def _pieces(self, flat: torch.Tensor) -> Iterator[Floats]:
        """The values in float64, of complex ones the magnitudes; each piece is valid until the next."""
        for begin in range(0, flat.numel(), _PIECE):
            piece = flat[begin : begin + _PIECE]
            for first in range(0, piece.numel(), _ALONE):
                part = piece[first : first + _ALONE]
                target = self._wide[first : first + part.numel()]
                target.copy_(part.to(torch.complex128).abs() if part.is_complex() else part)
            yield self._values[: piece.numel()]

    def _sums(self, data: npt.NDArray[np.uint8]) -> Ints:
        sums = np.zeros((blocks_of(data.nbytes), LANES), dtype=np.int64)
        for block, row in enumerate(sums):
            part = data[block * BLOCK_WORDS * WORD_BYTES : (block + 1) * BLOCK_WORDS * WORD_BYTES]
            if part.nbytes % WORD_BYTES:
                part = np.concatenate([part, np.zeros(-part.nbytes % WORD_BYTES, dtype=np.uint8)])
            words, products = (each[: part.nbytes // WORD_BYTES] for each in (self._words, self._products))
            np.copyto(words, part.view(np.int32))
            for lane in range(LANES):
                np.multiply(words, keys()[lane, : len(words)], out=products)
                row[lane] = np.add.reduce(products)
        return sums


def _moments(values: Floats, dtype: torch.dtype) -> tuple[float, ...]:
    """The `MOMENTS` of one piece, whose values are overwritten."""
    zeros = int(np.count_nonzero(values == 0.0))
    nans = infs = 0
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        nans, infs = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        values = values[np.isfinite(values)]
        if not values.size:
            return (0.0, math.inf, -math.inf, 1.0, 0.0, 0.0, zeros, nans, infs)
        low, high = float(values.min()), float(values.max())
    scale = 1.0
    if dtype in (torch.float64, torch.complex128):
        # The squares of the others cannot leave the range of float64.
        scale = max(abs(low), abs(high)) or 1.0
        values /= scale
    mean = min(max(float(np.add.reduce(values)) / values.size, low / scale), high / scale)
    values -= mean
    values *= values
    spread = float(np.add.reduce(values))
    return (float(values.size), low, high, scale, mean, spread, float(zeros), float(nans), float(infs))
