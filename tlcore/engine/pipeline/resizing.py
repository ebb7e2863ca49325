"""Sides of calls that differ from one before in how many rows their tensors have, and in nothing else.

A busy server has another number of tokens in nearly every step. All texts of such a side are made only if
somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ...layout.structure import Scalar
from ...layout.templates import STEP_DIR, Template
from ..calls import CallSide
from ..filters.tensors import TensorSpec
from .describing import Described, describe_side


def differ_in_rows(specs: Sequence[TensorSpec], others: Sequence[TensorSpec]) -> bool:
    """Whether tensors that are all stored differ from others in their first dimension, if at all."""
    return len(specs) == len(others) and all(map(_differ_in_rows, specs, others))


# A model's tensors have few forms.
@lru_cache(maxsize=4096)
def _differ_in_rows(spec: TensorSpec, other: TensorSpec) -> bool:
    if spec.outcome is not None or other.outcome is not None or spec.measured or other.measured:
        return False
    return spec is other or (
        len(spec.shape) == len(other.shape)
        and spec.shape[1:] == other.shape[1:]
        and spec.dtype == other.dtype
        and spec.device == other.device
        and spec.placements == other.placements
        and spec.original == other.original
    )


def resized(
    described: Described, side: CallSide, specs: Sequence[TensorSpec], scalars: Sequence[Scalar], rank: int
) -> Described:
    """The description of a side whose tensors `differ_in_rows` from those of ``described``."""
    stored = tuple(
        (index, name, origin.with_shape(specs[index].shape), specs[index].kind)
        for index, name, origin, _ in described.stored
    )

    def text() -> str:
        return describe_side(side, specs, scalars, rank).template.compact(STEP_DIR)

    return Described(stored, Template(text, described.template.kind))
