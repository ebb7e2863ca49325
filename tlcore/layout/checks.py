"""What numbers and shapes in stored documents can be."""

from __future__ import annotations

from typing import Any

# A file or shard larger than this (1 PiB) does not exist; a larger number is damage.
LARGEST_SIZE = 1 << 50
_MOST_DIMENSIONS = 64


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a shape that a tensor can have."""
    fits = isinstance(value, list) and len(value) <= _MOST_DIMENSIONS
    return fits and all(is_whole(extent, 0, LARGEST_SIZE) for extent in value)


def is_whole(value: Any, least: int = 0, most: int = 1 << 63) -> bool:
    """Whether a JSON value is an integer from ``least`` to ``most``; true and false are none."""
    return type(value) is int and least <= value <= most
