"""The table of dtypes is torch's."""

from __future__ import annotations

import torch

from tlcore.layout.dtypes import ITEM_SIZES, item_size, name_of, torch_dtype


def test_the_table_is_that_of_torch() -> None:
    for name, size in ITEM_SIZES.items():
        dtype = torch_dtype(name)
        # An older torch may lack the newest.
        if dtype is not None:
            assert (dtype.itemsize, name_of(dtype)) == (size, name)
    for name in ("float32", "bfloat16", "bool", "int64", "complex128", "float8_e4m3fn"):
        assert torch_dtype(name) is not None


def test_a_dtype_outside_of_the_table_is_torch_s() -> None:
    assert item_size("qint8") == torch.qint8.itemsize == 1
    assert item_size("double") == 8
    for name in ("nothing", "Tensor", "", None, 3, ["float32"]):
        assert item_size(name) is None
        assert torch_dtype(name) is None
