"""The kernel for statistics: what it computes, interpreted, and that compilers for devices take it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlcore.statistics import device
from tlcore.statistics.fingerprint import keys

from .test_statistics import DTYPES, on_host, random_bits

_triton = pytest.importorskip("triton")
# The interpreter of Triton 3.0 takes constants within a kernel for tensors.
_INTERPRETS = tuple(map(int, _triton.__version__.split(".")[:2])) >= (3, 1)
# Around a piece and a block of the hash, and bytes that do not fill a word.
NUMELS = (1, 3, 8193, 70001)
TARGETS = (("cuda", 75, 32), ("cuda", 90, 32), ("hip", "gfx942", 64))


def interpreted() -> None:
    """Hold the kernel's vectors against torch's and the host's. For a process that interprets kernels."""
    from tlcore.statistics import kernel

    all_keys = torch.from_numpy(keys())
    for dtype in DTYPES:
        if dtype not in kernel.DTYPES:
            continue
        for numel in NUMELS:
            # Also from an address that no word begins at.
            for tensor in (random_bits(dtype, (numel,)), random_bits(dtype, (numel + 1,))[1:]):
                if dtype == torch.float64:
                    tensor = torch.where(tensor.isfinite(), tensor, math.nan)
                found = kernel.measure(tensor, all_keys, device.PIECE_WORDS)
                assert found.numel() == device.vector_numel(tensor.nbytes)
                assert_same(found, device._by_torch(tensor))
                data = found.numpy().tobytes()
                told = device.statistics(data, numel, dtype, tensor.shape)
                expected = on_host(tensor.clone())
                assert told.hash == expected.hash, (dtype, numel)
                assert (told.min, told.max, told.nans) == (expected.min, expected.max, expected.nans)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Counts, extremes and sums to the bit; means and spreads but for the order of additions."""
    one, other = one.view(-1, 12), other.view(-1, 12)
    exact = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert one[:, exact].equal(other[:, exact])
    about = [4, 5]
    np.testing.assert_allclose(
        one[:, about].contiguous().view(torch.float64).numpy(),
        other[:, about].contiguous().view(torch.float64).numpy(),
        rtol=1e-9,
        atol=1e-300,
    )


@pytest.mark.skipif(not _INTERPRETS, reason="this Triton interprets no constants")
def test_the_interpreted_kernel_computes_what_torch_computes() -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from tests.statistics.test_kernel import interpreted; interpreted()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda each: f"{each[0]}-{each[1]}")
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp64", "i1"])
def test_compilers_for_devices_take_the_kernel(
    target: tuple[Any, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tlcore.statistics import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Some go there as their bits.
    element, size = {"bf16": ("i16", 2), "fp16": ("fp16", 2), "fp64": ("fp64", 8), "i1": ("u8", 1)}[kind]
    pointers = {
        "values": f"*{element}",
        "data": "*u8",
        "keys": "*i64",
        "found": "*i64",
        "found_float": "*fp64",
    }
    constants = {
        "VALUES": 4 * device.PIECE_WORDS // size,
        "WORDS": device.PIECE_WORDS,
        "PIECES_OF_BLOCK": keys().shape[1] // device.PIECE_WORDS,
        "HALF": kind == "fp16",
        "BFLOAT": kind == "bf16",
        "SCALED": kind == "fp64",
    }
    signature = {**pointers, "numel": "i32", "nbytes": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel._measure, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": 8})
    assert compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]


def test_a_kind_of_device_without_a_kernel_is_measured_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Nobody launches compiled kernels on a CPU, which is what a device that Triton does not know amounts to.
    without: set[str] = set()
    monkeypatch.setattr(device, "_without_kernel", without)
    tensor = random_bits(torch.float32, (9000,))
    with caplog.at_level("INFO", logger="tlcore"):
        first, second = device.measure(tensor), device.measure(tensor)
    assert first.equal(second) and first.equal(device._by_torch(tensor))
    assert without == {"cpu"}
    assert sum("no kernel" in record.message for record in caplog.records) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_one_kernel_computes_what_torch_computes(dtype: torch.dtype) -> None:
    from tlcore.statistics import kernel

    tensor = random_bits(dtype, (70001,)).cuda()
    found = device._by_kernel(tensor)
    assert device._without_kernel == {"cpu"}
    assert (found is None) == (dtype not in kernel.DTYPES)
    if found is not None:
        assert_same(found.cpu(), device._by_torch(tensor).cpu())
