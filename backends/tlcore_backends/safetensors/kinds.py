"""Steps of an index whose documents are alike but for numbers that any step may have there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tlcore.layout.checks import LARGEST_SIZE


def kinds_of(forms: Iterable[tuple[Any, ...]]) -> list[int]:
    """Of each step a number, equal for steps that are alike; ``forms`` are those of `SegmentIndex.forms`."""
    known: dict[Any, int] = {}
    return [
        known.setdefault((plan, extents, form_of_values(values), *own), len(known))
        for plan, extents, values, *own in forms
    ]


def form_of_values(values: Any) -> str | None:
    """The kinds of the values that a step's structures leave open; those of text and others themselves."""
    if values is None:
        return None
    return json.dumps([_kind(value) for value in values] if isinstance(values, list) else 0)


def _kind(value: Any) -> Any:
    if type(value) is int and abs(value) <= LARGEST_SIZE:
        return "negative" if value < 0 else "int"
    return "float" if type(value) is float else [value]
