"""How far two tensors are apart, a chunk at a time, so that every pass over a chunk stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .row_norms import Doubles, RowNorms, RowPeaks

Floats = npt.NDArray[np.float32]
Coarse: TypeAlias = tuple[bool | Doubles, bool | Doubles]

# Values in a chunk: few enough for the cache, enough to make the interpreter's part small.
CHUNK = 1 << 17
# Sums of squares in float32 outside of this may have lost or overflowed what matters.
_SMALLEST, _LARGEST = 1e-25, 1e37
# As many values as torch converts without waking threads of its own.
_UNTHREADED = 1 << 15
_ROW = 8192
_ONES: Floats = np.ones(CHUNK, np.float32)
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
_SCALED = 0.125
# As torch has none for them: one rounding, but for those that are mere powers of two.
_COARSEST = 0.25
# Half a step of int8, of what 126 of them reach: in a row with infinities 127 stands for these.
_HALF_STEP = 1 / 250
# Compiled and eager vLLM differed by up to 5.6e-6 of the norm in thirty layers of float32, most of it in the
# first twelve.
_KERNELS = {torch.float32: 8.0}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``|a - b| <= atol + rtol * |b|`` is agreement; None stands for the dtype's default.

    It holds for each value, or with ``norm`` for the tensor as a whole: relative L2 error at most ``rtol``,
    or root mean square error at most ``atol``; and four times of both for each row along its last dimension.
    With ``kernels`` the defaults are for two sides that computed the same with other kernels, with ``scaled``
    `between` floating tensors is as in `of_scaled_rows`.
    """

    rtol: float | None = None
    atol: float | None = None
    norm: bool = False
    kernels: bool = False
    scaled: bool = False

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for but what the dtypes have."""
        return self.rtol is None and self.atol is None

    def of(self, a: torch.dtype, b: torch.dtype) -> tuple[float, float]:
        """``(rtol, atol)`` for two dtypes: what was asked for, else the looser of the defaults."""
        one, other = _default(a), _default(b)
        rounding = max(_KERNELS.get(a, 1.0), _KERNELS.get(b, 1.0)) if self.kernels and a == b else 1.0
        rtol = rounding * max(one[0], other[0]) if self.rtol is None else self.rtol
        atol = max(one[1], other[1]) if self.atol is None else self.atol
        return rtol, atol

    def between(self, a: torch.dtype, b: torch.dtype) -> Tolerance:
        """The tolerance for tensors that two runs have in these dtypes.

        Between two floating ones it is that of the norm where nothing else was asked for: the narrower one
        rounds in every operation, and a single value near zero may then differ by any factor.
        """
        floating = a.is_floating_point and b.is_floating_point
        if self.scaled and floating:
            return self.of_scaled_rows()
        return replace(self, norm=True) if self.is_default and floating and a != b else self

    def of_scaled_rows(self) -> Tolerance:
        """The tolerance where int8 with a scale for each row went through a module: that of the norm, too.

        What one large value leaves of the others in a row of 8192 is within an eighth of its norm, mostly.
        """
        return replace(self, rtol=_SCALED, norm=True) if self.is_default else self


def _default(dtype: torch.dtype) -> tuple[float, float]:
    if dtype in _DEFAULTS:
        return _DEFAULTS[dtype]
    if not dtype.is_floating_point:
        return 0.0, 0.0
    rtol, atol = _NARROW_FLOAT
    eps = _eps(dtype)
    return (eps if eps <= _COARSEST else rtol), atol


def _eps(dtype: torch.dtype) -> float:
    try:
        return float(torch.finfo(dtype).eps)
    except (TypeError, RuntimeError):
        # Packed ones have none.
        return math.inf


@dataclass(frozen=True, slots=True)
class Measures:
    """Distances between two tensors of one shape, over the pairs of values that are both finite.

    ``max_rel`` is the largest ``|a - b| / |b|`` where b is not zero, ``rel_l2`` is ``|a - b| / |b|``
    in the Euclidean norm, and ``mismatched`` the fraction of all values that do not agree within the
    tolerance (a NaN agrees with a NaN, an infinity with the same infinity). ``cosine`` is None where
    one side is all zeros or nothing is finite, ``rel_l2`` where b is all zeros and a is not. ``agrees`` is
    the verdict. By norm ``worst_row`` is the row that is farthest off, by ``worst_row_l2`` of its norm or of
    the median row's. ``largest_at`` are the coordinates of the largest difference (of the first value that
    is not finite in one tensor alone, where there is one), ``largest`` both values there. Sums are good to
    about six digits for dtypes up to float32, else to those of float64.
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
    agrees: bool
    worst_row: int | None = None
    worst_row_l2: float | None = None
    largest_at: tuple[int, ...] | None = None
    largest: tuple[float, float] | None = None


EXACT = Measures(True, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, (0, 0), (0, 0), True)


def measure(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> Measures:
    """The distances between two CPU tensors. Raises ValueError when their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    sums = Sums(tolerance, a.dtype, b.dtype, a.shape)
    flat_a, flat_b = a.detach().reshape(-1), b.detach().reshape(-1)
    for begin in range(0, flat_a.numel(), CHUNK):
        sums.add(flat_a[begin : begin + CHUNK], flat_b[begin : begin + CHUNK])
    return sums.measures()


class Sums:
    """What is carried from one chunk of values to the next, for two dtypes of one shape.

    By norm, a side in ``coarse`` had each row rounded to steps of int8: the largest values of the rows that
    were, or True where these are the rows that are added.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        a: torch.dtype,
        b: torch.dtype,
        shape: Sequence[int] = (),
        coarse: Coarse = (False, False),
    ) -> None:
        self._norm, self._shape = tolerance.norm, tuple(shape)
        self._largest: tuple[int, float, float] | None = None
        self._unlike = False
        self._rows = RowNorms(shape[-1]) if self._norm and len(shape) > 1 and shape[-1] else None
        self._rtol, self._atol = tolerance.of(a, b)
        self._peaks = [RowPeaks(shape[-1]) if self._rows and each is True else None for each in coarse]
        self._known_peaks = [each for each in coarse if not isinstance(each, bool)]
        self._same_dtype = self._same = a == b
        self._single = _fits_float32(a) and _fits_float32(b)
        self._scratch: list[Floats] = []
        self._total = self._finite = self._mismatched = self._special = 0
        self._nans, self._infs = [0, 0], [0, 0]
        self._max_abs = self._max_rel = self._abs = self._squares = 0.0
        self._dot = self._a_squares = self._b_squares = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take in two flat chunks of equal length, at most `CHUNK`."""
        if not (self._single and a.numel() and self._add_single(a, b)):
            self._add_double(a, b)
        self._total += a.numel()

    def _add_single(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """The chunk in float32; False, with nothing added, where that is not exact enough.

        In numpy, whose functions run on the calling thread alone: the workers are the threads here.
        """
        if not self._scratch:
            self._scratch = [np.empty(a.numel(), np.float32) for _ in range(5)]
        count = a.numel()
        difference, sizes, quotients, *wide = (each[:count] for each in self._scratch)
        x, y = as_float32(a, wide[0]), as_float32(b, wide[1])
        with np.errstate(all="ignore"):
            np.abs(np.subtract(x, y, out=difference), out=difference)
            largest = float(difference.max())
            # Also where a value is NaN or infinite.
            if not largest < _LARGEST:
                return False
            squares = [_dot(one, one) for one in (x, y, difference)]
            if any(_inexact(square, one) for square, one in zip(squares, (x, y, difference), strict=True)):
                return False
            self._finite += count
            self._dot += _dot(x, y)
            self._a_squares += squares[0]
            self._b_squares += squares[1]
            self._squares += squares[2]
            if largest > 0 or self._rows is not None:
                np.abs(y, out=sizes)
            if self._rows is not None:
                self._rows.add(difference, sizes)
            for peaks, each in zip(self._peaks, (x, y), strict=True):
                if peaks is not None:
                    peaks.add(np.abs(each))
            if largest == 0:
                self._same = self._same and _equal_bits(a, b)
                return True
            self._same = False
            if largest > self._max_abs:
                self._max_abs = largest
                self._seen(int(difference.argmax()), x, y)
            self._max_rel = max(self._max_rel, _largest_quotient(difference, sizes, quotients))
            self._abs += _dot(difference, _ONES[:count])
            if largest > self._atol:
                limits = np.add(np.multiply(sizes, self._rtol, out=sizes), self._atol, out=sizes)
                self._mismatched += int(np.count_nonzero(np.greater(difference, limits)))
        return True

    def _add_double(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """The chunk in float64, with everything that is not finite."""
        unequal = _unequal_bits(a, b)
        self._same = self._same and unequal is not None and not bool(unequal.any())
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        for side, values in enumerate((x, y)):
            self._nans[side] += int(values.isnan().sum())
            self._infs[side] += int(values.isinf().sum())
        both = x.isfinite() & y.isfinite()
        apart = (x - y).abs().where(both, 0.0)
        if self._rows is not None:
            self._rows.add(apart.numpy(), y.abs().where(both, 0.0).numpy())
        for peaks, values in zip(self._peaks, (x, y), strict=True):
            if peaks is not None:
                peaks.add(values.abs().where(values.isfinite(), 0.0).numpy())
        if apart.numel() and float(apart.max()) > self._max_abs:
            self._seen(int(apart.argmax()), x, y)
        if bool(both.all()):
            wrong = self._finite_part(x, y)
        else:
            alike = ((x == y) | (x.isnan() & y.isnan())) & ~both
            unlike = ~both & ~alike
            special = int(unlike.sum())
            if special and not self._special:
                self._seen(int(unlike.int().argmax()), x, y)
                self._unlike = True
            self._special += special
            wrong = self._finite_part(x[both], y[both]) + special
        whole = not (a.is_floating_point() or a.is_complex())
        if unequal is not None and whole and self._rtol == self._atol == 0:
            # Large integers are not exact in float64.
            wrong = int(unequal.sum())
            if wrong and not float(apart.max()):
                self._seen_integers(a, b)
        self._mismatched += wrong

    def _seen(self, at: int, x: Any, y: Any) -> None:
        """Keep where the largest difference is; what is not finite in one tensor alone is larger than any."""
        if not self._unlike:
            a, b = (complex(side[at]) for side in (x, y))
            sides = (abs(a), abs(b)) if a.imag or b.imag else (a.real, b.real)
            self._largest = self._total + at, *sides

    def _seen_integers(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Keep where integers differ most that are the same in float64."""
        difference = (a.to(torch.int64) - b.to(torch.int64)).abs()
        at = int(difference.argmax())
        if int(difference[at]) > self._max_abs:
            self._max_abs = int(difference[at])
            self._largest = self._total + at, a[at].item(), b[at].item()

    def _finite_part(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """Add up finite values; returns how many are out of tolerance."""
        if x.numel() == 0:
            return 0
        difference, size = (x - y).abs(), y.abs()
        self._finite += x.numel()
        self._max_abs = max(self._max_abs, float(difference.max()))
        self._max_rel = max(self._max_rel, float(torch.where(size > 0, difference / size, 0.0).max()))
        self._abs += float(difference.sum())
        self._squares += float(difference.square().sum())
        self._dot += float((x * y.conj()).real.sum()) if x.is_complex() else float(torch.dot(x, y))
        self._a_squares += float(x.abs().square().sum())
        self._b_squares += float(size.square().sum())
        return int((difference > self._atol + self._rtol * size).sum())

    def measures(self) -> Measures:
        """The measures over all that was added."""
        count = max(self._finite, 1)
        a_norm, b_norm = math.sqrt(self._a_squares), math.sqrt(self._b_squares)
        distance, rms = math.sqrt(self._squares), math.sqrt(self._squares / count)
        cosine = max(-1.0, min(1.0, self._dot / a_norm / b_norm)) if a_norm and b_norm else None
        relative = distance / b_norm if b_norm else (None if distance else 0.0)
        near = (relative is not None and relative <= self._rtol) or rms <= self._atol
        row, row_error, rows_near = (None, None, True)
        if self._rows is not None:
            coarse = self._coarse()
            row, row_error, rows_near = self._rows.worst(self._rtol, self._atol, coarse)
            if coarse is not None and not near:
                left = distance - math.sqrt(self._shape[-1] * float(np.square(coarse).sum()))
                near = left <= max(self._rtol * b_norm, self._atol * math.sqrt(count))
        return Measures(
            bitwise=self._same and self._same_dtype,
            max_abs=self._max_abs,
            max_rel=self._max_rel,
            mean_abs=self._abs / count,
            rms=rms,
            cosine=cosine,
            rel_l2=relative,
            mismatched=self._mismatched / max(self._total, 1),
            nans=(self._nans[0], self._nans[1]),
            infs=(self._infs[0], self._infs[1]),
            agrees=near and rows_near and not self._special if self._norm else not self._mismatched,
            worst_row=row,
            worst_row_l2=row_error,
            largest_at=self._coordinates(),
            largest=None if self._largest is None else self._largest[1:],
        )

    def _coarse(self) -> Doubles | None:
        """How far off each row's values may be for the steps of int8; None where they have none."""
        peaks = [*self._known_peaks, *(each.found() for each in self._peaks if each is not None)]
        return _HALF_STEP * np.sum(peaks, axis=0) if peaks else None

    def _coordinates(self) -> tuple[int, ...] | None:
        if self._largest is None or not math.prod(self._shape) > self._largest[0]:
            return None
        return tuple(int(each) for each in np.unravel_index(self._largest[0], self._shape))


def _fits_float32(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize <= torch.float32.itemsize


def as_float32(values: torch.Tensor, scratch: Floats) -> Floats:
    """The values of a flat tensor of no wider dtype; in ``scratch``, which is as long, unless they lie so."""
    if values.dtype == torch.float32:
        found: Floats = values.numpy()
        return found
    target = torch.from_numpy(scratch)
    for begin in range(0, len(scratch), _UNTHREADED):
        target[begin : begin + _UNTHREADED].copy_(values[begin : begin + _UNTHREADED])
    return scratch


def _dot(x: Floats, y: Floats) -> float:
    """The sum of products: of each row in float32, of the rows in float64.

    A BLAS without a kernel for the processor adds up one value after the other, and in float32 the error of
    a sum of equal values then grows with their number.
    """
    whole = len(x) - len(x) % _ROW
    rows = np.matmul(x[:whole].reshape(-1, 1, _ROW), y[:whole].reshape(-1, _ROW, 1))
    return float(rows.sum(dtype=np.float64)) + float(np.dot(x[whole:], y[whole:]))


def _inexact(squares: float, values: Floats) -> bool:
    """Whether a sum of squares may have overflowed, or lost values that are small."""
    return not squares < _LARGEST or (squares < _SMALLEST and bool(values.any()))


def _largest_quotient(difference: Floats, sizes: Floats, out: Floats) -> float:
    """The largest quotient over sizes that are not zero."""
    found = float(np.divide(difference, sizes, out=out).max())
    if math.isfinite(found):
        return found
    return float(np.where(sizes > 0, out, 0).max())


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(np.array_equal(a.view(kind).numpy(), b.view(kind).numpy()))


def _unequal_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """Where two flat tensors of one dtype differ in any bit; None for two dtypes."""
    if a.dtype != b.dtype:
        return None
    bytes_a, bytes_b = (side.contiguous().view(torch.uint8).view(-1, side.element_size()) for side in (a, b))
    return (bytes_a != bytes_b).any(dim=1)
