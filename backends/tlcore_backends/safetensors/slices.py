"""Where a tensor lies in a shard, believed only as far as the record makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.checks import LARGEST_SIZE, is_shape, is_whole
from tlcore.layout.dtypes import item_size


@dataclass(frozen=True, slots=True)
class Slice:
    """The bytes ``[begin, end)`` of the file ``shard``, and the tensor that they are."""

    shard: str
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> Slice:
        """The place that a record states. Raises ReadError, naming ``where``, when it cannot be true."""
        shard = record.get("shard")
        offsets: Any = record.get("offsets")
        shape: Any = record.get("shape")
        dtype = str(record.get("dtype"))
        width = item_size(dtype)
        if not isinstance(shard, str) or width is None:
            raise ReadError(f"{where}: damaged record, or of a backend that this version cannot read")
        sound = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_whole, offsets))
        if not (sound and is_shape(shape)):
            raise ReadError(f"{where}: damaged record, offsets {offsets!r} and shape {shape!r}")
        begin, end = offsets
        if end > LARGEST_SIZE or end - begin != prod(shape) * width:
            raise ReadError(
                f"{where}: offsets {offsets!r} are not those of a {dtype} tensor of shape {shape!r}"
            )
        return cls(shard, begin, end, dtype, tuple(shape))
