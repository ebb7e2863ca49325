"""Safetensors files of others that the library itself refuses are refused here, and it is said why."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import tlcore
from tlcore.errors import ReadError


def _entry(begin: Any, end: Any, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _file(header: dict[str, Any] | bytes, size: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(size))


_A = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DAMAGED = {
    "overlapping": (
        _file({"a": _entry(0, 32, [8]), "b": _entry(16, 48, [8])}, 48),
        "'b' begins at 16 and the tensor before it ends at 32",
    ),
    "one_place": (_file({"a": _entry(0, 32, [8]), "b": _entry(0, 32, [8])}, 32), "'b' begins at 0"),
    "gap": (_file({"a": _entry(0, 16, [4]), "b": _entry(32, 64, [8])}, 64), "'b' begins at 32"),
    "late_begin": (
        _file({"a": _entry(8, 16, [2])}, 16),
        "'a' begins at 8 and the tensor before it ends at 0",
    ),
    "twice": (_file(_A + b',"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', 16), "'a' begins at 8"),
    "more_behind": (_file({"a": _entry(0, 16, [4])}, 64), "48 bytes behind its last tensor"),
    "cut": (_file({"a": _entry(0, 32, [8])}, 16), "ends too early, 16 bytes"),
    "negative": (_file({"a": _entry(-32, 0, [8])}, 0), "a shape or offset of 'a' makes no sense"),
    "backwards": (_file({"a": _entry(8, 0, [2])}, 8), "a shape or offset of 'a' makes no sense"),
    "negative_shape": (_file({"a": _entry(0, 8, [-2])}, 8), "a shape or offset of 'a' makes no sense"),
    "float_offset": (_file({"a": _entry(0.0, 8.0, [2])}, 8), "a shape or offset of 'a' makes no sense"),
    "no_number": (_file(_A.replace(b"8]", b"NaN]") + b"}", 8), "a shape or offset of 'a' makes no sense"),
    "other_shape": (_file({"a": _entry(0, 8, [3])}, 8), "the offsets of 'a' are not those of its shape"),
    "metadata": (_file({"__metadata__": {"x": 1}, "a": _entry(0, 8, [2])}, 8), "its metadata are no texts"),
    "encoding": (_file(_A.replace(b'"a"', b'"\xff"') + b"}", 8), "damaged safetensors header"),
    "nested": (_file(b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}", 0), "damaged safetensors header"),
    "no_object": (_file(b"[]", 0), "not a safetensors file"),
    "header_length": (struct.pack("<Q", 1 << 62) + b"{}", f"its header would have {1 << 62} bytes"),
    "header_cut": (struct.pack("<Q", 500) + _A, "damaged safetensors header"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_the_library_refuses_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    data, why = DAMAGED[name]
    with pytest.raises(SafetensorError):
        load(data)
    file = tmp_path / "any.safetensors"
    file.write_bytes(data)
    with pytest.raises(ReadError) as raised:
        tlcore.open_run(file)
    assert f"{file}: " in str(raised.value) and why in str(raised.value)


@pytest.mark.parametrize("own", [{}, {"format": "pt", "\u00e4": "\u00f6"}])
def test_what_the_library_takes_is_read(own: dict[str, str], tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0, 3), "none": torch.zeros(0), "scalar": torch.tensor(1.5),
        "flags": torch.ones(3) > 0,
        "half": torch.randn(2, 3).bfloat16(), "narrow": torch.randn(5).to(torch.float8_e5m2),
        "whole": torch.arange(3), "pairs": torch.randn(2, dtype=torch.complex64),
    }  # fmt: skip
    file = tmp_path / "any.safetensors"
    file.write_bytes(save(tensors, own))
    step = tlcore.open_run(file).step(0)
    for name, tensor in tensors.items():
        found = step.tensor(f"step_0/{name}/outputs")
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
