"""How far each row of two tensors is apart: one that is wrong hides in the norm of a large tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]

# Rounding scatters: some rows of clean pairs are off by several times what the whole tensor is.
_SCATTER = 4.0


class RowNorms:
    """Takes in flat chunks, which need not end where a row of ``size`` values does."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._sums: tuple[list[Doubles], list[Doubles]] = ([], [])

    def add(self, difference: Numbers, values: Numbers) -> None:
        """The absolute differences of the next values, and the absolute values they are held against."""
        within, starts = _starts(self._taken, self._size, len(difference))
        for parts, each in zip(self._sums, (difference, values), strict=True):
            sums = np.add.reduceat(np.square(each, dtype=np.float64), starts)
            if within:
                parts[-1][-1] += sums[0]
                sums = sums[1:]
            if len(sums):
                parts.append(sums)
        self._taken += len(difference)

    def worst(self, rtol: float, atol: float, coarse: Doubles | None = None) -> tuple[int, float, bool]:
        """The worst row, its relative L2 error, and whether all rows agree within four times the tolerance.

        The error is held against the row's norm, or the median row's where that is larger: a row that is
        nearly zero has nothing but noise. ``coarse`` is how far off a row's values may be beside that.
        """
        if not self._taken:
            return 0, 0.0, True
        errors, relative = self._errors()
        near = (relative <= _SCATTER * rtol) | (errors <= _SCATTER * atol * np.sqrt(self._size))
        if coarse is not None:
            left = np.maximum(errors - np.sqrt(self._size) * coarse, 0.0)
            with np.errstate(all="ignore"):
                near |= left <= _SCATTER * rtol * np.where(relative > 0, errors / relative, 0.0)
            near |= left <= _SCATTER * atol * np.sqrt(self._size)
        row = int(np.argmax(np.where(near, 0.0, relative))) if not near.all() else int(np.argmax(relative))
        return row, float(relative[row]), bool(near.all())

    def relative(self) -> Doubles:
        """The relative L2 error of each row, held against the same as in `worst`."""
        return self._errors()[1] if self._taken else np.zeros(0)

    def _errors(self) -> tuple[Doubles, Doubles]:
        errors, norms = (np.sqrt(np.concatenate(parts)) for parts in self._sums)
        scale = np.maximum(norms, np.median(norms))
        with np.errstate(all="ignore"):
            relative: Doubles = np.where(errors > 0, errors / scale, 0.0)
        return errors, relative


class RowPeaks:
    """The largest magnitude in each row of a tensor that comes in flat chunks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._parts: list[Doubles] = []

    def add(self, values: Numbers) -> None:
        """The magnitudes of the next values, none of which is NaN."""
        within, starts = _starts(self._taken, self._size, len(values))
        peaks = np.maximum.reduceat(values, starts).astype(np.float64)
        if within:
            self._parts[-1][-1] = max(self._parts[-1][-1], peaks[0])
            peaks = peaks[1:]
        if len(peaks):
            self._parts.append(peaks)
        self._taken += len(values)

    def found(self) -> Doubles:
        """A value for each row."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0)


def _starts(taken: int, size: int, count: int) -> tuple[int, npt.NDArray[np.intp]]:
    """How much of a row was taken before, and where in the next values each row begins."""
    within = taken % size
    starts = np.arange(-within, count, size)
    starts[0] = 0
    return within, starts
