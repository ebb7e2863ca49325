"""Where a tensor lies in a shard, believed only as far as the record makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..errors import ReadError
from ..record import tensor_from_bytes

# No store holds a blob as large as this; a larger offset is damage.
_LARGEST_OFFSET = 1 << 50


@dataclass(frozen=True, slots=True)
class Slice:
    """The bytes ``[begin, end)`` of the file ``shard``, and the tensor that they are."""

    shard: str
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> Slice:
        """The place that a record states. Raises ReadError, naming ``where``, when it cannot be true."""
        shard = record.get("shard")
        offsets: Any = record.get("offsets")
        shape: Any = record.get("shape")
        dtype = getattr(torch, str(record.get("dtype")), None)
        if not isinstance(shard, str) or not isinstance(dtype, torch.dtype):
            raise ReadError(f"{where}: damaged record, or of a backend that this version cannot read")
        if not (_whole_numbers(offsets) and _whole_numbers(shape) and len(offsets) == 2):
            raise ReadError(f"{where}: damaged record, offsets {offsets!r} and shape {shape!r}")
        begin, end = offsets
        if end > _LARGEST_OFFSET or end - begin != prod(shape) * dtype.itemsize:
            raise ReadError(
                f"{where}: offsets {offsets!r} are not those of a {dtype} tensor of shape {shape!r}"
            )
        return cls(shard, begin, end, dtype, tuple(shape))

    def tensor(self, data: bytes, where: str) -> torch.Tensor:
        """The tensor of the bytes read. Raises ReadError when there are too few."""
        try:
            return tensor_from_bytes(bytearray(data), self.dtype, self.shape)
        except (ValueError, RuntimeError) as error:
            raise ReadError(f"{where}: {self.shard} ends too early or is damaged ({error})") from error


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
