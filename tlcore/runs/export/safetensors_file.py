"""One safetensors file, written from memory as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tlcore_backends.safetensors.shard import header_of

from ...errors import ReadError
from ...layout.dtypes import torch_dtype
from ...storage import Buffer

_ALIGNMENT = 8

# A tensor's dtype, its shape, and its bytes.
Tensor = tuple[str, tuple[int, ...], Buffer]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file; ``tensors`` in their order. Raises ReadError for a dtype that the format lacks."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        found = torch_dtype(dtype)
        assert found is not None
        begin, end = end, end + memoryview(data).nbytes
        entry, unknown = header_of(found, shape)
        if unknown:
            raise ReadError(f"safetensors has no type for the {dtype} of {name}")
        header[name] = json.loads(f"{entry}[{begin},{end}]}}")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            view = memoryview(data).cast("B")
            while view:
                view = view[file.write(view) :]
