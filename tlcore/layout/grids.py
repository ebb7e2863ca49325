"""Batches outside vLLM are grids of samples and positions: a tensor's shape tells which axis is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Grid(NamedTuple):
    """A batch of ``samples`` sequences in which a call computes ``length`` positions of each.

    These attend to ``keys`` positions. ``channels``: some tensors of the model may have their positions last.
    ``weights`` are those of ``length`` and ``samples * length`` that an axis may have for another reason: the
    model's weights have such an extent, or it may have the positions in front of the samples.
    """

    samples: int
    length: int
    keys: int
    channels: bool = False
    weights: tuple[int, ...] = ()


UNCLEAR = -1


def axis_of(shape: Sequence[int], whole_numbers: bool, grid: Grid) -> int | None:
    """Which axis of a tensor is that of a grid's positions; 0 where samples and positions are one axis.

    None for a tensor that is not of this grid. `UNCLEAR` where it might be, or has nothing of a sample's own.
    """
    if not shape:
        return None
    samples, length = grid.samples, grid.length
    if samples > 1 and shape[0] != samples and 1 in (shape[0], len(shape)) and length in shape[:2]:
        # The same for each sample, such as the cosines of positions.
        return UNCLEAR
    if samples == length in grid.weights and tuple(shape[:2]) == (samples, length):
        return UNCLEAR
    if len(shape) <= 2:
        return _axis_of_few(shape, whole_numbers, grid)
    if shape[0] != samples:
        return None
    if len(shape) > 3:
        return _axis_of_heads(shape, grid)
    if whole_numbers and shape[2] == grid.keys > 1:
        return UNCLEAR
    fitting = [axis for axis in ((1, 2) if grid.channels else (1,)) if shape[axis] == length]
    if len(fitting) > 1 and length > 1:
        return UNCLEAR
    return fitting[0] if fitting else None


def _axis_of_few(shape: Sequence[int], whole_numbers: bool, grid: Grid) -> int | None:
    total = grid.samples * grid.length
    if len(shape) == 2 and tuple(shape) == (grid.samples, grid.length):
        # One vector for each sample may be as long as there are positions.
        return UNCLEAR if grid.length > 1 and not whole_numbers and grid.length in grid.weights else 1
    if shape[0] != total:
        return None
    if len(shape) == 2 and shape[1] == grid.keys > 1:
        return UNCLEAR
    return UNCLEAR if not whole_numbers and total in grid.weights else 0


def _axis_of_heads(shape: Sequence[int], grid: Grid) -> int | None:
    """Heads come before the positions or after them; masks and what is attended to have ``keys`` as well."""
    length, keys = grid.length, grid.keys
    if length > 1 or keys > 1:
        extents = {length, keys} - {1}
        hits = [axis for axis in range(1, len(shape)) if shape[axis] in extents]
        if length == 1:
            if hits:
                return UNCLEAR
        elif not any(shape[axis] == length for axis in hits):
            return None
        else:
            return hits[0] if len(hits) == 1 and hits[0] < 3 else UNCLEAR
    return next((axis for axis in (1, 2) if shape[axis] == 1), None)


def as_rows(tensor: Any, axis: int) -> Any:
    """A tensor with its samples and its positions, which lie along ``axis``, as one leading axis of rows."""
    if axis == 0:
        return tensor
    return tensor.movedim(axis, 1).flatten(0, 1)


def grid_entry(grid: Grid) -> dict[str, Any]:
    """A grid as ``step.json`` has it."""
    found: dict[str, Any] = {"samples": grid.samples, "length": grid.length, "keys": grid.keys}
    if grid.channels:
        found["channels"] = True
    return found | ({"weights": list(grid.weights)} if grid.weights else {})


def read_grid(entry: Any) -> Grid:
    """The grid of an entry of ``step.json``. Raises ValueError where it is damaged."""
    numbers = [entry["samples"], entry["length"], entry["keys"], *entry.get("weights", ())]
    if not all(type(each) is int and each >= 0 for each in numbers):
        raise ValueError(str(entry)[:200])
    samples, length, keys, *weights = numbers
    return Grid(samples, length, keys, bool(entry.get("channels", False)), tuple(weights))
