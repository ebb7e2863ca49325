"""Rows of a tensor in several steps, of which no more is read than these rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ReadError
from ..layout.dtypes import torch_dtype
from ..layout.row_scale import is_scaled
from ..record import Json, tensor_from_bytes
from .alike import AlikeTensors
from .dataset.places import row_bytes, row_form
from .placements import is_part
from .stored import Stored

if TYPE_CHECKING:
    import torch

# What one step's record of a tensor has for itself, wherever its bytes lie.
_OWN = ("hash", "alias_of")


class ChosenRows(NamedTuple):
    """``length`` rows, from ``first`` on, of a step's tensor; counted as in `tlcore.layout.grids.as_rows`."""

    step: int
    record: Json
    axis: int
    first: int
    length: int


def read_chosen(stored: Stored, pieces: Sequence[ChosenRows], unshard: bool) -> torch.Tensor | None:
    """The rows of all pieces, one after the other; None where whole tensors have to be read for them.

    Raises MissingError or ReadError.
    """
    first, ends = pieces[0], list(accumulate(piece.length for piece in pieces))
    form = _form(first, unshard)
    if form is None or any(_form(piece, unshard) != form for piece in pieces[1:]):
        return None
    dtype, shape, width = form
    data = np.empty((ends[-1], width), np.uint8)
    for number in _not_together(stored, pieces, ends, data):
        piece, end = pieces[number], ends[number]
        found = stored.read_range(piece.record, piece.first * width, (piece.first + piece.length) * width)
        if memoryview(found).nbytes != piece.length * width:
            raise ReadError(f"{stored.url}: {piece.record['name']!r}: ends too early or is damaged")
        data[end - piece.length : end] = np.frombuffer(found, np.uint8).reshape(piece.length, width)
    return tensor_from_bytes(data.reshape(-1).data, dtype, (len(data), *shape))


def _form(piece: ChosenRows, unshard: bool) -> tuple[torch.dtype, tuple[int, ...], int] | None:
    """The dtype, shape and size of a row; None where rows do not follow one another as they are wanted."""
    record, axis = piece.record, piece.axis
    dtype = torch_dtype(record["dtype"])
    if axis == 2 or is_scaled(record) or is_part(record) or (unshard and "part" in record) or dtype is None:
        return None
    width = row_bytes(record, axis)
    return (dtype, row_form(record["shape"], axis), width) if width else None


def _not_together(
    stored: Stored, pieces: Sequence[ChosenRows], ends: Sequence[int], data: Any
) -> Sequence[int]:
    """Read what can be read in few calls, and return which pieces are left."""
    alike = AlikeTensors(stored)
    if not alike.are_read_together:
        return range(len(pieces))
    left: list[int] = []
    groups: list[list[int]] = []
    for number, piece in enumerate(pieces):
        own = _bare(piece.record)
        for group in groups:
            if _bare(alike.record_in(pieces[group[0]].record, piece.step)) == own:
                group.append(number)
                break
        else:
            groups.append([number])
    for group in groups:
        steps = list(dict.fromkeys(pieces[number].step for number in group))
        places = {step: place for place, step in enumerate(steps)}
        rows = [
            (places[each.step], each.first, ends[number] - each.length, each.length)
            for number in group
            for each in (pieces[number],)
        ]
        read = alike.read_rows(pieces[group[0]].record, steps, np.array(sorted(rows), np.int64), data)
        left += [number for number in group if not read[places[pieces[number].step]]]
    return left


def _bare(record: Json) -> Json:
    return {key: value for key, value in record.items() if key not in _OWN}
