"""Running statistics for each channel: for each place along a tensor's last dimension, over all of its rows.

Parts are put together by the formula of Chan, Golub and LeVeque, which loses nothing where the mean is far
from zero, as the difference of a sum of squares and the square of a sum would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The rows of a table, which has a column for each channel. All but the last are of finite values: how many,
# their mean, the sum of squared distances from it, the smallest, the largest and how many of them are zero.
COLUMNS = ("count", "mean", "m2", "min", "max", "zeros", "nonfinite")
Table = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class ChannelStatistics:
    """Statistics of each channel; ``table`` has `COLUMNS` as rows, ``count`` 0 where none was finite."""

    table: Table

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return int(self.table.shape[1])

    @property
    def count(self) -> Table:
        """How many finite values there were."""
        return self._row(0)

    @property
    def mean(self) -> Table:
        """Their mean; NaN without any."""
        return self._where_any(self._row(1))

    @property
    def m2(self) -> Table:
        """The sum of their squared distances from the mean."""
        return self._row(2)

    @property
    def var(self) -> Table:
        """The variance of the population; NaN without values."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._where_any(self.m2 / self.count)

    @property
    def std(self) -> Table:
        """Its square root."""
        root: Table = np.sqrt(self.var)
        return root

    @property
    def min(self) -> Table:
        """The smallest of them; NaN without any."""
        return self._where_any(self._row(3))

    @property
    def max(self) -> Table:
        """The largest of them; NaN without any."""
        return self._where_any(self._row(4))

    @property
    def zeros(self) -> Table:
        """How many of them are zero."""
        return self._row(5)

    @property
    def nonfinite(self) -> Table:
        """How many values were NaN or infinite, and are in none of the others."""
        return self._row(6)

    def merge(self, *others: ChannelStatistics) -> ChannelStatistics:
        """Those of all values of this and the others. Raises ValueError where the channels do not fit."""
        return merge_channels([self, *others])

    def _row(self, at: int) -> Table:
        row: Table = self.table[at]
        return row

    def _where_any(self, values: Table) -> Table:
        return np.where(self.count > 0, values, math.nan)

    def __repr__(self) -> str:
        return (
            f"<ChannelStatistics of {self.channels} channels, up to {int(self.count.max(initial=0))} values>"
        )


def merge_channels(parts: Iterable[ChannelStatistics]) -> ChannelStatistics:
    """The statistics of all values of several: of runs, ranks, or layers that are alike.

    Raises ValueError where there is none, or they have different numbers of channels.
    """
    listed = list(parts)
    widths = sorted({each.channels for each in listed})
    if len(widths) != 1:
        found = f"of {', '.join(map(str, widths))} channels" if widths else "of nothing"
        raise ValueError(f"statistics {found} cannot be merged")
    table = listed[0].table.copy()
    for each in listed[1:]:
        add(table, each.table)
    return ChannelStatistics(table)


def empty(channels: int) -> Table:
    """The table of no values at all."""
    table = np.zeros((len(COLUMNS), channels))
    table[3], table[4] = math.inf, -math.inf
    return table


def add(table: Table, other: Table) -> None:
    """Put another table's values into ``table``."""
    count = table[0] + other[0]
    share = other[0] / np.maximum(count, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        apart = other[1] - table[1]
        table[2] += other[2] + apart * apart * (table[0] * share)
        table[1] += apart * share
    table[0] = count
    np.minimum(table[3], other[3], out=table[3])
    np.maximum(table[4], other[4], out=table[4])
    table[5:] += other[5:]


def table_of(values: Table) -> Table:
    """The table of some rows, [rows, channels], which are overwritten."""
    rows, channels = values.shape
    if not rows:
        return empty(channels)
    table = np.empty((len(COLUMNS), channels))
    values.min(axis=0, out=table[3])
    values.max(axis=0, out=table[4])
    if not (np.isfinite(table[3]).all() and np.isfinite(table[4]).all()):
        return _table_of_some(values, np.isfinite(values))
    table[0], table[6] = rows, 0
    table[5] = rows - np.count_nonzero(values, axis=0)
    with np.errstate(over="ignore"):
        np.add.reduce(values / rows, axis=0, out=table[1])
        values -= table[1]
        # What rounding has left of the mean.
        drift = np.add.reduce(values, axis=0) / rows
        values -= drift
        values *= values
        np.clip(table[1] + drift, table[3], table[4], out=table[1])
        table[2] = np.add.reduce(values, axis=0)
    return table


def _table_of_some(values: Table, finite: npt.NDArray[np.bool_]) -> Table:
    table = np.empty((len(COLUMNS), values.shape[1]))
    table[0] = np.count_nonzero(finite, axis=0)
    table[3] = np.where(finite, values, math.inf).min(axis=0)
    table[4] = np.where(finite, values, -math.inf).max(axis=0)
    table[5] = np.count_nonzero(values == 0, axis=0)
    table[6] = len(values) - table[0]
    clean = np.where(finite, values, 0.0)
    with np.errstate(over="ignore"):
        table[1] = np.add.reduce(clean / np.maximum(table[0], 1.0), axis=0)
        table[2] = np.add.reduce(np.where(finite, clean - table[1], 0.0) ** 2, axis=0)
    return table
