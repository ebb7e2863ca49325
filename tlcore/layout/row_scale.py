"""Rows of int8 that end in their scale: how ``store_dtype: "int8"`` lies in files, and how it is read back.

A row (along the last dimension) of C values is C int8 and the four bytes of a float32, its scale: a value is
its int8 times the scale. In a row with NaN or infinities the scale is itself a NaN, so that whoever knows no
more sees that something is amiss. Its lower 22 bits are then those of the true scale (sign, and the last nine
bits of its fraction, left out), and -128 stands for NaN, 127 and -127 for the infinities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .dtypes import item_size, torch_dtype

if TYPE_CHECKING:
    import torch

STORED = "int8"
# The key of records and structures, and its only value: the dtype of the scale.
KEY, SCALE = "row_scale", "float32"
SCALE_BYTES = 4
NAN, INFINITY = -128, 127
# A float32 without its mantissa is NaN or infinite; a quiet NaN has 22 more bits that are free.
QUIET_NAN, EXPONENT, FREE, CUT = 0x7FC00000, 0x7F800000, 0x003FFFFF, 9
_AS_STORED = "as_stored"


def packed_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape in which a tensor lies in rows with a scale; None for one that is left as it is.

    One of fewer than two dimensions has no rows of its own, and of very short ones the scale takes too much.
    """
    if len(shape) < 2 or not dtype.is_floating_point or dtype.itemsize <= 1:
        return None
    width = shape[-1] + SCALE_BYTES
    return (*shape[:-1], width) if width < shape[-1] * dtype.itemsize else None


def is_scaled(record: Mapping[str, Any]) -> bool:
    """Whether a record's bytes are rows with a scale."""
    return KEY in record


def presented(record: Mapping[str, Any]) -> Any:
    """A record with the dtype and shape that its tensor is read in; `as_stored` gives it back."""
    if KEY not in record:
        return record
    own = {key: value for key, value in record.items() if key != KEY}
    shape = [*record["shape"][:-1], record["shape"][-1] - SCALE_BYTES]
    return {**own, "dtype": record["converted_from"], "shape": shape, _AS_STORED: record}


def presented_node(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of a tensor in a structure, where a dtype has its ``torch.``."""
    if KEY not in node:
        return node
    shape = [*node["shape"][:-1], node["shape"][-1] - SCALE_BYTES]
    own = {key: value for key, value in node.items() if key != KEY}
    return {**own, "dtype": f"torch.{node['converted_from']}", "shape": shape}


def as_stored(record: Any) -> Any:
    """The record that was `presented`, or itself."""
    return record.get(_AS_STORED, record)


def problem_of(record: Mapping[str, Any]) -> str | None:
    """What makes no sense in a record, or a structure's tensor, that says that it has scales, in words."""
    if record[KEY] != SCALE:
        return "a scale of rows that no capture writes"
    shape = record["shape"]
    if record["dtype"].removeprefix("torch.") != STORED or len(shape) < 2 or shape[-1] < SCALE_BYTES:
        return "a scale of rows where there can be none"
    known = record.get("converted_from")
    if known not in ("float64", "float32", "bfloat16", "float16") or item_size(known) is None:
        return "rows with a scale of a dtype that has none"
    return None


def restored(packed: torch.Tensor, name: str) -> torch.Tensor:
    """The values of int8 rows ``[..., C + 4]`` in the dtype of this name, ``[..., C]``."""
    import torch

    dtype = torch_dtype(name)
    assert dtype is not None
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = packed[..., :-SCALE_BYTES]
    # A single row's would count as contiguous where it stands, though not aligned.
    word = packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.int32)
    odd = (word & EXPONENT) == EXPONENT
    bits = torch.where(odd, (word & FREE) << CUT, word)
    found = values.to(exact).mul_(bits.view(torch.float32).to(exact))
    # Asking a device would wait for it.
    if not packed.is_cpu or bool(odd.any()):
        # The scale was rounded up.
        most = torch.finfo(dtype).max
        found = torch.where(odd & (values == NAN), torch.nan, found.clamp_(-most, most))
        found = torch.where(odd & (values.abs() == INFINITY), values.sign() * torch.inf, found)
    return found.to(dtype)
