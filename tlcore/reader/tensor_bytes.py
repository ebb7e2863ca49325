"""Tensors and the bytes that a record has of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import ReadError
from ..layout.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch


def kind(record: Mapping[str, Any], where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """A record's dtype and shape. Raises ReadError, naming ``where``, when its size is another."""
    dtype, shape = torch_dtype(record.get("dtype")), record["shape"]
    if dtype is None:
        raise ReadError(f"{where}: damaged record, there is no dtype {str(record.get('dtype'))[:100]!r}")
    size = prod(shape) * dtype.itemsize
    if size != record.get("bytes", size):
        raise ReadError(f"{where}: {record['bytes']} bytes are no {dtype} tensor of shape {shape!r}")
    return dtype, tuple(shape)


def payload(tensor: torch.Tensor) -> memoryview:
    """The C-contiguous bytes of a CPU tensor, as a record holds them."""
    if tensor.numel() == 0:
        return memoryview(b"")
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
