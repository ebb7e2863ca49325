"""What a row's place is made of: an array of many steps, a step's tensor, or one that is read as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ...layout.dtypes import item_size
from ...layout.row_scale import is_scaled, restored
from ...protocols import Buffer
from ...record import Json
from ..tensor_bytes import payload

# A matrix of bytes, which may be a part of a larger one.
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def row_form(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape of one row of a tensor whose positions lie along ``axis`` (`tlcore.layout.rows.as_rows`)."""
    return (
        tuple(shape[1:]) if axis == 0 else tuple(each for at, each in enumerate(shape[1:], 1) if at != axis)
    )


class Packed(NamedTuple):
    """Rows with a scale (`layout.row_scale`): the dtype that they stand for, and their length as stored."""

    dtype: str
    width: int

    @classmethod
    def of(cls, record: Json) -> Packed | None:
        """What a record's rows are; None where they have no scale."""
        return cls(str(record["converted_from"]), int(record["shape"][-1])) if is_scaled(record) else None

    def restored(self, data: Buffer) -> Buffer:
        """The bytes of the values."""
        import torch

        own = bytearray(data) if memoryview(data).readonly else data
        return payload(restored(torch.frombuffer(own, dtype=torch.int8).view(-1, self.width), self.dtype))


class InArray(NamedTuple):
    """An array by its number among the rank's; ``unit`` is how many bytes one of its rows has.

    ``nbytes`` tells it from one that has its number since other files are there. Where its rows have a scale,
    ``packed`` is the dtype that they are of.
    """

    rank: int
    number: int
    row_bytes: int
    unit: int
    nbytes: int
    packed: Packed | None = None


class InRecord(NamedTuple):
    """A step's tensor, whose rows follow one another; ``record`` may be that of a step that is alike."""

    record: Json
    row_bytes: int
    packed: Packed | None = None


class Whole(NamedTuple):
    """A step's tensor that is read as a whole: its rows do not follow one another, or ranks hold parts.

    ``key`` is its name without the step.
    """

    key: str
    axis: int
    row_bytes: int
    packed: None = None


Place = InArray | InRecord | Whole


def row_bytes(record: Json, axis: int) -> int:
    """How many bytes a row has as it is stored."""
    return prod(row_form(record["shape"], axis)) * (item_size(record["dtype"]) or 0)
