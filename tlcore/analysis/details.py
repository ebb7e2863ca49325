"""What one pair of tensors tells beyond its measures: units in the last place, percentiles, rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .measure import Floats, as_float32

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Differences are counted by the upper half of their bits in float32: 0.4 % of their size.
_BINS, _SHIFT = 1 << 16, 16
# The bits of an infinity in float32; those of a NaN are more.
_INFINITE = 0x7F80_0000
# As many values as torch works on without waking threads of its own.
_UNTHREADED = 1 << 14


@dataclass(frozen=True, slots=True)
class Details:
    """How a tensor's differences are spread.

    ``ulps`` is the largest distance in units in the last place of the coarser dtype, None for whole
    numbers. ``percentiles`` of the absolute differences are those of `PERCENTILES`, to half a percent.
    Where the dtypes differ, ``rounded_equal`` is the fraction of values that are equal once both are
    rounded to the coarser one, and ``rounded_max_abs`` the largest difference then. Values that are not
    finite are left out.
    """

    ulps: int | None
    percentiles: tuple[float, ...]
    rounded_equal: float | None = None
    rounded_max_abs: float | None = None

    def __str__(self) -> str:
        parts = [] if self.ulps is None else [f"up to {self.ulps} ulp"]
        shown = (f"{value:.3g} at {at:g} %" for at, value in zip(PERCENTILES, self.percentiles, strict=False))
        parts.append(f"percentiles of |A - B|: {', '.join(shown)}")
        if self.rounded_equal is not None and self.rounded_max_abs is not None:
            coarse = f"rounded to the coarser dtype {self.rounded_equal:.2%} are equal"
            parts.append(f"{coarse}, the rest up to {self.rounded_max_abs:.3g} apart")
        return "; ".join(parts)


class DetailSums:
    """Takes in flat chunks of two dtypes."""

    def __init__(self, a: torch.dtype, b: torch.dtype) -> None:
        floating = a.is_floating_point and b.is_floating_point
        self._coarse = _coarser(a, b) if floating else None
        self._mixed = floating and a != b
        self._narrow = floating and a == b and a.itemsize <= torch.float32.itemsize
        self._bins = np.zeros(_BINS, np.int64)
        self._ulps = self._count = self._equal = 0
        self._largest = 0.0
        self._scratch: list[Floats] = []

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take in two chunks of equal length."""
        if self._narrow and self._add_narrow(a, b):
            return
        for begin in range(0, a.numel(), _UNTHREADED):
            end = begin + _UNTHREADED
            self._add_wide(a[begin:end], b[begin:end])

    def _add_narrow(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Two chunks of one dtype that float32 holds; False, with nothing added, where not all is finite.

        In numpy, as in `Sums`: torch's threads cost many times what they do where other work has the cores.
        """
        if len(self._scratch) < 2 or len(self._scratch[0]) < a.numel():
            self._scratch = [np.empty(a.numel(), np.float32) for _ in range(3)]
        first, second, apart = (each[: a.numel()] for each in self._scratch)
        with np.errstate(all="ignore"):
            np.abs(np.subtract(as_float32(a, first), as_float32(b, second), out=apart), out=apart)
        bits = apart.view(np.int32)
        if bits.max(initial=0) >= _INFINITE:
            return False
        self._count_bits(bits)
        self._ulps = max(self._ulps, _ulps(a, b))
        return True

    def _count_bits(self, bits: npt.NDArray[np.int32]) -> None:
        counts = np.bincount(bits >> _SHIFT)
        self._bins[: len(counts)] += counts

    def _add_wide(self, a: torch.Tensor, b: torch.Tensor) -> None:
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        both = x.isfinite() & y.isfinite()
        self._count_bits((x - y).abs()[both].to(torch.float32).numpy().view(np.int32))
        if self._coarse is None:
            return
        rounded = a.to(self._coarse), b.to(self._coarse)
        # Of one byte they know hardly any operation.
        x, y = (each.to(torch.float64) for each in rounded)
        both &= x.isfinite() & y.isfinite()
        apart = (x - y).abs()[both]
        self._count += apart.numel()
        self._equal += int((apart == 0).sum())
        if apart.numel():
            self._largest = max(self._largest, float(apart.max()))
            self._ulps = max(self._ulps, _steps(*(_bits(each)[both.numpy()] for each in rounded)))

    def details(self) -> Details:
        """Of all that was added."""
        counted = np.cumsum(self._bins)
        total = int(counted[-1])
        places = [int(np.searchsorted(counted, at / 100 * total)) for at in PERCENTILES] if total else []
        # The middle of a bin; the first one's is 0, which most differences are.
        middles = (np.array(places, np.int32) << _SHIFT) + [(1 << (_SHIFT - 1)) * bool(at) for at in places]
        found = tuple(float(each) for each in middles.astype(np.int32).view(np.float32))
        ulps = None if self._coarse is None else self._ulps
        if not self._mixed:
            return Details(ulps, found)
        return Details(ulps, found, self._equal / max(self._count, 1), self._largest)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def _ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest number of steps from one value to the next between two tensors of a dtype, all finite."""
    return _steps(_bits(a), _bits(b)) if a.numel() else 0


def _bits(values: torch.Tensor) -> npt.NDArray[Any]:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    found: npt.NDArray[Any] = values.contiguous().view(kind).numpy()
    return found


def _steps(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """As many as lie between the bits of two floating values, at most."""
    size = a.dtype.itemsize
    top = np.iinfo(a.dtype).max
    sides = []
    for bits in (a, b):
        sign = bits >> (8 * size - 1)
        # Steps from zero: of a negative value minus its bits without the sign.
        sides.append((bits ^ (sign & top)) - sign)
    # Between large values of different signs they fit only without one.
    steps = np.maximum(*sides) - np.minimum(*sides)
    return int(steps.view(f"u{size}").max())
