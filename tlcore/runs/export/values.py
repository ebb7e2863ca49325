"""What is written of each row: tensors or sums of them, in dtypes that every reader knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import ReadError
from ...layout.dtypes import torch_dtype
from ...reader.dataset.dataset import OrderedDataset, RowDataset
from ...reader.dataset.order import Plan

# float32 has every value of these.
_WIDENED = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_KNOWN = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
)
_PLUS = " + "


@dataclass(frozen=True)
class Column:
    """One tensor, or the sum of several, of each row.

    vLLM's layers give what they add and what it is added to apart: the hidden state is their sum.
    """

    name: str
    terms: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    def tensor(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Its values for rows of a data set."""
        first, *others = (rows[term] for term in self.terms)
        for other in others:
            first = first + other
        return first

    @property
    def written_dtype(self) -> str:
        """The dtype in files that are no torch's: one of NumPy's that holds each value exactly."""
        return "float32" if self.dtype in _WIDENED else self.dtype

    def array(self, rows: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        """Its values, as they are written in files that are no torch's."""
        found = self.tensor(rows)
        return (found.float() if self.dtype in _WIDENED else found).contiguous().numpy()


def terms_of(names: Sequence[str]) -> list[str]:
    """The tensors that columns need, each once; ``a + b`` is the sum of two."""
    return list(dict.fromkeys(term for name in names for term in name.split(_PLUS)))


def columns_of(data: RowDataset, names: Sequence[str], of_torch: bool) -> list[Column]:
    """The columns, in order. Raises ReadError for a sum of different tensors, or a dtype nobody reads."""
    forms = data.forms
    found = []
    for name in names:
        terms = tuple(name.split(_PLUS))
        kinds = {forms[term] for term in terms}
        if len(kinds) > 1:
            shown = " and ".join(f"{each.dtype} {list(each.shape)}" for each in kinds)
            raise ReadError(f"{name!r} cannot be added up: {shown}")
        (form,) = kinds
        if len(terms) > 1 and not _adds(form.dtype):
            raise ReadError(
                f"{name!r} cannot be added up: torch has no sum of {form.dtype};"
                " name its terms one by one, and add them up in a wider dtype"
            )
        if not of_torch and form.dtype not in (*_WIDENED, *_KNOWN):
            raise ReadError(f"{name!r} is of {form.dtype}, which this format has no type for")
        found.append(Column(name, terms, form.dtype, form.shape))
    return found


def _adds(dtype: str) -> bool:
    """Whether torch has sums of a dtype."""
    kind = torch_dtype(dtype)
    assert kind is not None
    try:
        torch.add(torch.zeros(1, dtype=kind), torch.zeros(1, dtype=kind))
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def in_order(data: RowDataset, window_bytes: int) -> OrderedDataset:
    """The items as they lie, so many bytes of them read at a time."""
    return OrderedDataset(data, Plan(None, 0, window_bytes))
