"""What numbers and shapes in stored documents can be."""

from __future__ import annotations

from typing import Any

# A file or shard larger than this (1 PiB) does not exist; a larger number is damage.
LARGEST_SIZE = 1 << 50
_MOST_DIMENSIONS = 64
# What fits into 64 bits.
LARGEST_WHOLE = 1 << 63


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a shape that a tensor can have."""
    fits = isinstance(value, list) and len(value) <= _MOST_DIMENSIONS
    return fits and all(is_whole(extent, 0, LARGEST_SIZE) for extent in value)


def is_whole(value: Any, least: int = 0, most: int = LARGEST_WHOLE) -> bool:
    """Whether a JSON value is an integer from ``least`` to ``most``; true and false are none."""
    return type(value) is int and least <= value <= most


def are_whole(values: Any) -> bool:
    """Whether a list has nothing but what `is_whole`; however long it is, it takes little time."""
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= LARGEST_WHOLE
