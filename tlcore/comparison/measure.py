"""How far two tensors are apart: one pass in float64, a bounded number of values at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_CHUNK = 1 << 20
# Those of torch.testing.assert_close: (rtol, atol).
_DEFAULTS = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (1e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
_NARROW_FLOAT = (1.6e-2, 1e-5)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``|a - b| <= atol + rtol * |b|`` is agreement; None stands for the dtype's default."""

    rtol: float | None = None
    atol: float | None = None

    def of(self, a: torch.dtype, b: torch.dtype) -> tuple[float, float]:
        """``(rtol, atol)`` for two dtypes: what was asked for, else the looser of the defaults."""
        one, other = _default(a), _default(b)
        rtol = max(one[0], other[0]) if self.rtol is None else self.rtol
        atol = max(one[1], other[1]) if self.atol is None else self.atol
        return rtol, atol


def _default(dtype: torch.dtype) -> tuple[float, float]:
    narrow = _NARROW_FLOAT if dtype.is_floating_point else (0.0, 0.0)
    return _DEFAULTS.get(dtype, narrow)


@dataclass(frozen=True, slots=True)
class Measures:
    """Distances between two tensors of one shape, over the pairs of values that are both finite.

    ``max_rel`` is the largest ``|a - b| / |b|`` where b is not zero, ``rel_l2`` is ``|a - b| / |b|``
    in the Euclidean norm, and ``mismatched`` the fraction of all values that do not agree within the
    tolerance (a NaN agrees with a NaN, an infinity with the same infinity). ``cosine`` is None where
    one side is all zeros or nothing is finite, ``rel_l2`` where b is all zeros and a is not.
    """

    bitwise: bool
    max_abs: float
    max_rel: float
    mean_abs: float
    rms: float
    cosine: float | None
    rel_l2: float | None
    mismatched: float
    nans: tuple[int, int]
    infs: tuple[int, int]


EXACT = Measures(True, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, (0, 0), (0, 0))


def measure(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> Measures:
    """The distances between two CPU tensors. Raises ValueError when their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    sums = _Sums(*tolerance.of(a.dtype, b.dtype))
    flat_a, flat_b = a.detach().reshape(-1), b.detach().reshape(-1)
    for begin in range(0, flat_a.numel(), _CHUNK):
        sums.add(flat_a[begin : begin + _CHUNK], flat_b[begin : begin + _CHUNK])
    return sums.measures(flat_a.numel(), a.dtype == b.dtype)


class _Sums:
    """What is carried from one chunk of values to the next."""

    def __init__(self, rtol: float, atol: float) -> None:
        self._rtol, self._atol = rtol, atol
        self._same = True
        self._finite = self._mismatched = 0
        self._nans, self._infs = [0, 0], [0, 0]
        self._max_abs = self._max_rel = self._abs = self._squares = 0.0
        self._dot = self._a_squares = self._b_squares = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take in two flat chunks of equal length."""
        unequal = _unequal_bits(a, b)
        self._same = self._same and unequal is not None and not bool(unequal.any())
        x, y = _wide(a), _wide(b)
        for side, values in enumerate((x, y)):
            self._nans[side] += int(values.isnan().sum())
            self._infs[side] += int(values.isinf().sum())
        both = x.isfinite() & y.isfinite()
        if bool(both.all()):
            wrong = self._finite_part(x, y)
        else:
            special = ((x == y) | (x.isnan() & y.isnan())) & ~both
            wrong = self._finite_part(x[both], y[both]) + int((~both & ~special).sum())
        if (
            unequal is not None
            and not (a.is_floating_point() or a.is_complex())
            and self._rtol == self._atol == 0
        ):
            # Large integers are not exact in float64.
            wrong = int(unequal.sum())
        self._mismatched += wrong

    def _finite_part(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """Add up finite values; returns how many are out of tolerance."""
        if x.numel() == 0:
            return 0
        difference, size = (x - y).abs(), y.abs()
        self._finite += x.numel()
        self._max_abs = max(self._max_abs, float(difference.max()))
        nonzero = size > 0
        relative = torch.where(nonzero, difference / size, 0.0)
        self._max_rel = max(self._max_rel, float(relative.max()))
        self._abs += float(difference.sum())
        self._squares += float(difference.square().sum())
        self._dot += float((x * y.conj()).real.sum()) if x.is_complex() else float(torch.dot(x, y))
        self._a_squares += float(x.abs().square().sum())
        self._b_squares += float(size.square().sum())
        return int((difference > self._atol + self._rtol * size).sum())

    def measures(self, total: int, same_dtype: bool) -> Measures:
        """The measures over all that was added."""
        count = max(self._finite, 1)
        a_norm, b_norm = math.sqrt(self._a_squares), math.sqrt(self._b_squares)
        distance = math.sqrt(self._squares)
        cosine = max(-1.0, min(1.0, self._dot / a_norm / b_norm)) if a_norm and b_norm else None
        relative = distance / b_norm if b_norm else (None if distance else 0.0)
        return Measures(
            bitwise=self._same and same_dtype,
            max_abs=self._max_abs,
            max_rel=self._max_rel,
            mean_abs=self._abs / count,
            rms=math.sqrt(self._squares / count),
            cosine=cosine,
            rel_l2=relative,
            mismatched=self._mismatched / max(total, 1),
            nans=(self._nans[0], self._nans[1]),
            infs=(self._infs[0], self._infs[1]),
        )


def _unequal_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """Where two flat tensors of one dtype differ in any bit; None for two dtypes."""
    if a.dtype != b.dtype:
        return None
    bytes_a, bytes_b = (side.contiguous().view(torch.uint8).view(-1, side.element_size()) for side in (a, b))
    return (bytes_a != bytes_b).any(dim=1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
