"""Safetensors files that differ in how many rows their tensors have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

from tlcore_backends.safetensors.shard import header_of

from ...errors import ReadError
from ...layout.dtypes import torch_dtype

_ALIGNMENT = 8


class FileOf:
    """Files with tensors of these dtypes, and of these shapes behind the rows.

    Raises ReadError for a dtype that the format lacks.
    """

    def __init__(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._tensors = [(name, *each) for name, each in tensors.items()]
        for name, dtype, shape in self._tensors:
            found = torch_dtype(dtype)
            assert found is not None
            if header_of(found, shape)[1]:
                raise ReadError(f"safetensors has no type for the {dtype} of {name}")

    def head(self, rows: int, metadata: Mapping[str, str]) -> bytes:
        """What stands before the bytes of so many rows of each tensor, one tensor after the other."""
        entries = [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}']
        end = 0
        for name, dtype, shape in self._tensors:
            found = torch_dtype(dtype)
            assert found is not None
            begin, end = end, end + rows * prod(shape) * found.itemsize
            entry, _ = header_of(found, (rows, *shape))
            entries.append(f"{json.dumps(name)}:{entry}[{begin},{end}]}}")
        text = f"{{{','.join(entries)}}}".encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text
