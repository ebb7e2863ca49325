"""Statistics and content hashes: exact, the same on every device, for every dtype."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tlcore.statistics import device as device_statistics
from tlcore.statistics.fingerprint import BLOCK_BYTES
from tlcore.statistics.host import HostStatistics
from tlcore.statistics.summary import Statistics

FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    # Newer than the oldest torch.
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),
)
INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.complex128)
SHAPES = ((), (0,), (3, 5), (7, 0, 2), (197, 701))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def on_host(tensor: torch.Tensor) -> Statistics:
    return HostStatistics().statistics(bits(tensor), tensor.dtype, tensor.shape)


def by_vector(tensor: torch.Tensor) -> Statistics:
    vector = device_statistics.measure(tensor)
    assert vector.device == tensor.device and vector.dtype == torch.int64
    assert vector.numel() == device_statistics.vector_numel(tensor.nbytes)
    data = vector.cpu().numpy().tobytes()
    return device_statistics.statistics(data, tensor.numel(), tensor.dtype, tensor.shape)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern may come up, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(3)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return (data % 2 if dtype == torch.bool else data).view(dtype).view(shape)


def reference(tensor: torch.Tensor) -> dict[str, Any]:
    """By the textbook, from Python's exact sums over float64 values."""
    wide = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.to(torch.float64)
    values = wide.reshape(-1).tolist()
    finite = [value for value in values if math.isfinite(value)]
    found: dict[str, Any] = {
        "numel": len(values),
        "zeros": sum(value == 0 for value in values),
        "nans": sum(math.isnan(value) for value in values),
        "infs": sum(math.isinf(value) for value in values),
        **dict.fromkeys(("min", "max", "mean", "std", "l2")),
    }
    if finite:
        unit = max(map(abs, finite)) or 1.0
        mean = math.fsum(value / unit for value in finite) / len(finite)
        spread = math.fsum((value / unit - mean) ** 2 for value in finite) / len(finite)
        found |= {"min": min(finite), "max": max(finite), "mean": mean * unit}
        found |= {"std": math.sqrt(spread) * unit}
        found |= {"l2": math.sqrt(math.fsum((value / unit) ** 2 for value in finite)) * unit}
    return found


def assert_agrees(found: Statistics, expected: dict[str, Any]) -> None:
    for key in ("numel", "zeros", "nans", "infs", "min", "max"):
        assert getattr(found, key) == expected[key], key
    if expected["min"] is None:
        assert (found.mean, found.std, found.l2) == (None, None, None)
        return
    scale = max(abs(expected["min"]), abs(expected["max"]))
    for key in ("mean", "std"):
        assert getattr(found, key) == pytest.approx(expected[key], rel=1e-12, abs=1e-13 * scale), key
    assert found.l2 == pytest.approx(expected["l2"], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_agree_with_the_textbook(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = random_bits(dtype, shape)
        expected = reference(tensor)
        host, vector = on_host(tensor), by_vector(tensor)
        assert_agrees(host, expected)
        assert_agrees(vector, expected)
        assert host.hash == vector.hash


@pytest.mark.parametrize(
    "values",
    [
        [3.7] * 1000,
        [1e300, -1e300, 1e300],
        [1e-200, 3e-200, 2e-200],
        [1e9 + each for each in range(100)],
        [float("nan")] * 3,
        [float("inf"), float("-inf"), float("nan"), 0.0, -0.0],
        [float("inf"), 2.0],
    ],
    ids=lambda values: str(values[:2]),
)
def test_values_that_naive_sums_get_wrong(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    for found in (on_host(tensor), by_vector(tensor)):
        assert_agrees(found, reference(tensor))
        if len(set(values)) == 1 and math.isfinite(values[0]):
            assert found.std == 0 and found.mean == values[0]


def test_a_mean_far_from_zero_leaves_a_small_spread_exact_over_many_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = 1e6 + torch.randn(1_000_003, dtype=torch.float64, generator=generator)
    expected = float(tensor.var(correction=0).sqrt())
    for found in (on_host(tensor), by_vector(tensor)):
        assert found.std == pytest.approx(expected, rel=1e-10)


def test_equal_hashes_mean_equal_dtype_shape_and_bytes() -> None:
    base = torch.arange(1 << 17, dtype=torch.int32)
    tensors = [
        base,
        base.view(2, -1),
        base.view(torch.float32),
        base[:-1],
        base.flip(0),
        torch.cat([base[BLOCK_BYTES // 4 :], base[: BLOCK_BYTES // 4]]),
        base.to(torch.int64),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(0),
        torch.zeros(0, 1),
        torch.zeros(()),
        torch.tensor([0.0, -0.0]),
        torch.tensor([-0.0, 0.0]),
        torch.tensor([-0.0, -0.0]),
    ]
    hashes = [on_host(tensor).hash for tensor in tensors]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [by_vector(tensor).hash for tensor in tensors]
    assert hashes == [on_host(tensor.clone()).hash for tensor in tensors]


def test_every_single_bit_counts() -> None:
    data = torch.zeros(61, dtype=torch.uint8)
    hashes = {on_host(data).hash}
    for place, bit in itertools.product(range(61), range(8)):
        changed = data.clone()
        changed[place] = 1 << bit
        hashes.add(on_host(changed).hash)
    assert len(hashes) == 1 + 61 * 8


def test_strided_conjugated_and_misaligned_tensors_count_by_their_values() -> None:
    base = random_bits(torch.float32, (64, 33))
    conjugated = torch.view_as_complex(torch.randn(9, 2)).conj()
    for tensor in (base.T, base[1:, 3:], conjugated, random_bits(torch.uint8, (101,))[1:]):
        plain = tensor.resolve_conj().contiguous().clone()
        assert by_vector(tensor).hash == on_host(plain).hash
        assert_agrees(by_vector(tensor), reference(tensor))


def test_measuring_leaves_no_trace_in_autograd() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    assert not device_statistics.measure(weight * 2).requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_condition_sees_every_nan_and_infinity(dtype: torch.dtype) -> None:
    host = HostStatistics()
    patterns = 1 << min(16, 8 * dtype.itemsize)
    if dtype.itemsize == 1:
        every = torch.arange(patterns, dtype=torch.int32).to(torch.uint8).view(dtype)
    else:
        every = random_bits(dtype, (200,))
        every[::7] = float("inf")
        every[1::7] = float("nan")
    for value in every:
        expected = not bool(torch.isfinite(value.to(torch.float64)))
        assert host.has_nonfinite(bits(value), dtype) is expected


def test_integers_are_never_looked_through_for_nan() -> None:
    host = HostStatistics()
    for dtype in (*INTEGERS, torch.bool):
        assert not host.has_nonfinite(bits(random_bits(dtype, (9,))), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_the_same_hash_and_statistics(dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (3, 1 << 20)):
        tensor = random_bits(dtype, shape)
        host, device = on_host(tensor), by_vector(tensor.cuda())
        assert device.hash == host.hash
        if math.prod(shape) < 1 << 20:
            assert_agrees(device, reference(tensor))


@pytest.mark.gpu
def test_measuring_on_a_gpu_does_not_make_the_host_wait() -> None:
    tensor = torch.randn(1 << 20, device="cuda")
    device_statistics.measure(tensor)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        device_statistics.measure(tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
