"""Dtypes by their names, as every file of a run has them; torch is needed only where a tensor is made."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Bytes an element. A name that is not here is looked up in torch, which may be a newer one.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}


def name_of(dtype: torch.dtype | str) -> str:
    """The name of a dtype, such as ``float32``; of a name, itself."""
    return str(dtype).removeprefix("torch.")


def item_size(name: object) -> int | None:
    """How many bytes an element has; None where there is no dtype of this name."""
    known = ITEM_SIZES.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    found = torch_dtype(name)
    return None if found is None else found.itemsize


def torch_dtype(name: object) -> torch.dtype | None:
    """torch's dtype of a name; None where it has none."""
    return _torch_dtype(name) if isinstance(name, str) else None


@lru_cache(256)
def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None
