"""Arrow tables of items, and what `datasets` wants to find in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .job import pyarrow
from .values import Column

Array = np.ndarray[Any, Any]
# As `datasets` calls them.
_TYPES = {"bool": "bool_"}


def value_type(dtype: str) -> Any:
    """The Arrow type of a dtype."""
    return getattr(pyarrow(), _TYPES.get(dtype, dtype))()


def fixed(values: Array, shape: Sequence[int]) -> Any:
    """Rows ``[n, *shape]`` as nested lists of fixed size; numbers where a row has no dimensions."""
    pa = pyarrow()
    found = pa.array(values.reshape(-1))
    for size in reversed(shape):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found


def fixed_type(column: Column) -> Any:
    """The type of `fixed`."""
    found = value_type(column.written_dtype)
    for size in reversed(column.shape):
        found = pyarrow().list_(found, size)
    return found


def listed(items: Any, counts: Sequence[int]) -> Any:
    """A list for each item, of as many of ``items`` as its count says."""
    pa = pyarrow()
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), items)


def boxes(values: Array, count: int, shape: Sequence[int]) -> Any:
    """``[count, *shape]`` as nested lists: how `datasets` stores arrays of one shape."""
    pa = pyarrow()
    found = pa.array(values.reshape(-1))
    for dimension in range(len(shape), 0, -1):
        size = shape[dimension - 1]
        lists = count * prod(shape[: dimension - 1])
        offsets = pa.array(np.arange(0, lists * size + 1, size, dtype=np.int32))
        found = pa.ListArray.from_arrays(offsets, found)
    return found


def box_field(name: str, dtype: str, shape: Sequence[int]) -> Any:
    """The field of `boxes`, which `datasets` knows by the name of its type."""
    pa = pyarrow()
    found = value_type(dtype)
    for _ in shape:
        found = pa.list_(found)
    of_datasets = f"datasets.features.features.Array{len(shape)}DExtensionType"
    about = {
        "ARROW:extension:name": of_datasets,
        "ARROW:extension:metadata": json.dumps([list(shape), dtype]),
    }
    return pa.field(name, found, metadata=about)


def feature(dtype: str) -> dict[str, Any]:
    """How `datasets` describes a number or text."""
    return {"dtype": dtype, "_type": "Value"}


def list_feature(inner: Mapping[str, Any], length: int = -1) -> dict[str, Any]:
    """How `datasets` describes a list."""
    found = {"feature": dict(inner), "_type": "List"}
    return found if length < 0 else {**found, "length": length}


def with_features(schema: Any, features: Mapping[str, Any]) -> Any:
    """The schema with what `datasets` says of its columns."""
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
