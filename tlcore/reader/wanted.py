"""The dtype in which a stored tensor is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ReadError
from ..layout.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

ORIGINAL = "original"
STORED = "stored"
Wanted: TypeAlias = "torch.dtype | str | None"


def as_wanted(tensor: torch.Tensor, record: Mapping[str, Any], dtype: Wanted) -> torch.Tensor:
    """A record's tensor in a dtype, or ``"original"``: in that which it had before ``store_dtype``.

    What the conversion has rounded stays rounded. With ``"stored"`` it stays as it is: of rows with a scale
    it is their bytes, where all else has them restored. Raises ReadError where there is no such dtype.
    """
    if dtype is None or dtype == STORED:
        return tensor
    if dtype == ORIGINAL:
        dtype = record.get("converted_from")
        if dtype is None:
            return tensor
    found = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    if found is None:
        raise ReadError(f"{record.get('name')!r}: there is no dtype {str(dtype)[:100]!r}")
    return tensor.to(found)
