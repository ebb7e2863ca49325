"""Where rows lie in models that get a step's tokens as a batch of one sample: transformers' code in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from .grids import UNCLEAR


def axis_in_sample(shape: Sequence[int], whole_numbers: bool, lengths: Sequence[int]) -> int | None:
    """Which axis of a tensor is that of rows, where it may have an axis of one sample before that; else 0.

    ``lengths`` are how many rows there can be, without padding and with it. None for a tensor that has no
    such axis, `UNCLEAR` where it might. Of a single token no row is told from a sample: tensors of more
    than two axes then count as a sample, which they are at all other times.
    """
    if not shape:
        return None
    extents = set(lengths) - {1} or {1}
    alone = extents == {1}
    if shape[0] != 1:
        # Of several dimensions positions are (dimensions, 1, tokens), planes (planes, 1, tokens, size).
        planes = len(shape) > 2 and shape[1] == 1 and shape[2] in extents
        return None if shape[0] not in extents else UNCLEAR if planes else 0
    if len(shape) <= 2:
        return _axis_of_few(shape, whole_numbers, extents)
    if len(shape) == 3:
        hits = [1] if shape[1] in extents else []
    elif alone:
        hits = [axis for axis in (1, 2) if shape[axis] == 1][:1]
    else:
        # Heads come before the tokens or after them.
        hits = [axis for axis in range(1, len(shape)) if shape[axis] in extents]
    if not hits:
        return UNCLEAR if 1 in lengths else None
    return hits[0] if len(hits) == 1 and hits[0] < 3 else UNCLEAR


def _axis_of_few(shape: Sequence[int], whole_numbers: bool, extents: set[int]) -> int | None:
    """Token ids and positions are (1, tokens); of other numbers that may be one vector of the sample."""
    alone = extents == {1}
    if len(shape) == 2 and whole_numbers and shape[1] in extents:
        return 1
    if alone:
        return 0
    return UNCLEAR if len(shape) == 2 and shape[1] in extents else None
