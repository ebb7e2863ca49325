"""The ``.pt`` encoder against ``torch.save``, byte for byte."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcore_backends.pt import encode as pt_format

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
    *(
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ),
]
SHAPES = [
    (),
    (0,),
    (1,),
    (3, 0),
    (0, 3),
    (2, 3),
    (5, 1, 2),
    (1, 2, 3, 4),
    (300,),
    (70000,),
    (2, 40000),
]


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with reproducible bytes of ``dtype``; booleans stay 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(count)
    data = torch.randint(
        0,
        2 if dtype is torch.bool else 256,
        (count,),
        dtype=torch.uint8,
        generator=generator,
    )
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return data.view(dtype).view(shape)


def payload(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def encoded(tensor: torch.Tensor) -> bytes:
    """The whole file that the encoder makes."""
    return b"".join(pt_format.encode(tensor.dtype, tuple(tensor.shape), payload(tensor)))


def saved(tensor: torch.Tensor) -> bytes:
    """The whole file that torch makes."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


# Releases before this one pad the archive's members otherwise; all of them load ours.
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
as_torch_saves = pytest.mark.skipif(TORCH < (2, 13), reason="an older torch pads otherwise")


@as_torch_saves
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_torch_save(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = sample(dtype, shape)
    assert encoded(tensor) == saved(tensor)


@as_torch_saves
@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 9), max_size=6), st.sampled_from(DTYPES))
def test_any_shape_is_encoded_as_torch_does(shape: list[int], dtype: torch.dtype) -> None:
    tensor = sample(dtype, tuple(shape))
    assert encoded(tensor) == saved(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_it_also_mapped(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = sample(dtype, (3, 5))
    path = tmp_path / "t.pt"
    path.write_bytes(encoded(tensor))
    if dtype in (torch.uint16, torch.uint32, torch.uint64) and TORCH < (2, 5):
        pytest.skip("this torch does not load what it saves itself")
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert loaded.dtype == dtype
        assert loaded.shape == tensor.shape
        assert bytes(payload(loaded)) == bytes(payload(tensor))


def test_payload_is_not_copied_and_is_aligned() -> None:
    tensor = sample(torch.float32, (7, 11))
    data = payload(tensor)
    head, middle, _ = pt_format.encode(tensor.dtype, tuple(tensor.shape), data)
    assert middle is data
    assert len(head) % 64 == 0


def test_the_archive_is_sound_for_other_zip_readers() -> None:
    with zipfile.ZipFile(io.BytesIO(encoded(sample(torch.int16, (9,))))) as archive:
        assert archive.testzip() is None


def test_a_payload_above_four_gibibytes_uses_zip64() -> None:
    size = (1 << 32) + 100
    frame = pt_format._frame("uint8", (size,))
    tail = frame.tail(0xA92A4CE5)
    # What torch.save writes for this many zero bytes, recorded once: the file has 4294968989 bytes.
    assert len(frame.head) + size + len(tail) == 4294968989
    assert len(frame.head) % 64 == 0
    assert struct.pack("<HHQQ", 1, 16, size, 0) in frame.head
    assert tail.startswith(struct.pack("<4sIQQ", b"PK\x07\x08", 0xA92A4CE5, size, size))
    assert b"1572819951185464302603500324270329461208" in tail


def test_a_payload_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 bytes do not make a torch.float32 tensor of shape \(2,\)"):
        pt_format.encode(torch.float32, (2,), memoryview(bytes(4)))


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_the_payload_is_found_in_exactly_our_own_files(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=torch.float32)
    payload = tensor.numpy().tobytes()
    head, _, tail = map(bytes, pt_format.encode(tensor.dtype, shape, memoryview(payload)))
    data = head + payload + tail
    found = pt_format.payload_in(tensor.dtype, shape, data)
    assert found is not None and bytes(found) == payload
    assert pt_format.payload_in(tensor.dtype, (*shape, 2), data) is None
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        inside = len(head) <= position < len(head) + len(payload)
        accepted = pt_format.payload_in(tensor.dtype, shape, bytes(changed)) is not None
        assert accepted == inside, position
