"""Where the largest difference is, units in the last place, percentiles, and what rounding leaves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tlcore
from tests.analysis.emitting import emitted
from tlcore.analysis.details import PERCENTILES, Details, DetailSums
from tlcore.analysis.measure import CHUNK, Measures, Tolerance, measure


def details(a: torch.Tensor, b: torch.Tensor) -> Details:
    sums = DetailSums(a.dtype, b.dtype)
    for begin in range(0, a.numel(), 1000):
        sums.add(a.view(-1)[begin : begin + 1000], b.view(-1)[begin : begin + 1000])
    return sums.details()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulps_are_the_steps_from_one_value_to_the_next(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, -3.5, 0.0, 100.0], dtype=dtype)
    b = a.clone()
    for _ in range(5):
        b[1] = torch.nextafter(b[1], torch.tensor(0.0, dtype=dtype))
    assert details(a, b).ulps == 5
    # Across zero, whose two signs are one place.
    b[2] = torch.nextafter(torch.tensor(0.0, dtype=dtype), torch.tensor(-1.0, dtype=dtype))
    assert details(a[2:3], b[2:3]).ulps == 1
    assert details(a[2:3], -a[2:3]).ulps == 0
    limits = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    far = details(limits, -limits).ulps
    assert far is not None and far > 2 ** (8 * dtype.itemsize - 2)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_ulps_of_any_bits_are_counted_exactly(dtype: torch.dtype) -> None:
    width = dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 256, (2, 4000, width), np.uint8)
    sides = [torch.from_numpy(each).view(dtype).flatten() for each in bits]
    finite = sides[0].to(torch.float64).isfinite() & sides[1].to(torch.float64).isfinite()
    a, b = (torch.from_numpy(each[finite.numpy()]).view(dtype).flatten() for each in bits)
    top = 1 << (8 * width - 1)
    places = []
    for each in bits[:, finite.numpy()]:
        numbers = [int.from_bytes(each_value.tobytes(), "little") for each_value in each]
        places.append([number if number < top else top - number for number in numbers])
    for begin in (0, 1000, 2000):
        apart = (abs(one - two) for one, two in zip(*(p[begin : begin + 1000] for p in places), strict=True))
        assert details(a[begin : begin + 1000], b[begin : begin + 1000]).ulps == max(apart)


def test_percentiles_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_011, generator=generator)
    b = a + 1e-3 * torch.randn(20_011, generator=generator).exp()
    b[:100], b[100] = a[:100], math.nan
    expected = np.percentile((a.double() - b.double()).abs()[~b.isnan()].numpy(), PERCENTILES)
    assert details(a, b).percentiles == pytest.approx(expected, rel=0.01)
    assert details(a[:50], b[:50]).percentiles == (0.0,) * len(PERCENTILES)
    assert details(a[100:101], b[100:101]).percentiles == ()


def test_between_dtypes_rounding_is_taken_away() -> None:
    a = torch.randn(500, generator=torch.Generator().manual_seed(0))
    b = a.bfloat16()
    found = details(a, b)
    assert (found.ulps, found.rounded_equal, found.rounded_max_abs) == (0, 1.0, 0.0)
    b[7] = -b[7]
    found = details(a, b)
    assert found.rounded_equal == 0.998 and found.rounded_max_abs == 2 * abs(float(b[7]))
    assert found.ulps is not None and "rounded to the coarser dtype 99.80% are equal" in str(found)
    assert details(a, a * 2).rounded_equal is None
    whole = details(torch.arange(5), torch.arange(5) + 1)
    assert whole.ulps is None and whole.percentiles == pytest.approx([1.0] * 4, rel=0.005)


def at(a: torch.Tensor, b: torch.Tensor) -> Measures:
    return measure(a, b, Tolerance())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_the_largest_difference_is_found_in_any_chunk(dtype: torch.dtype) -> None:
    a = torch.zeros(3, CHUNK // 2 + 7, dtype=dtype)
    assert at(a, a.clone()).largest_at is None
    b = a.clone()
    b[0, 5], b[2, 11], b[2, 12] = 1, -3, 2
    found = at(a, b)
    assert (found.largest_at, found.largest) == ((2, 11), (0.0, -3.0))
    if dtype.is_floating_point:
        # What is not finite in one alone comes before any size.
        b[1, 3] = torch.nan
        b[2, 1] = torch.inf
        found = at(a, b)
        assert found.largest_at == (1, 3) and found.largest is not None and math.isnan(found.largest[1])
    else:
        assert at(a[0, 0], a[0, 0] + 1).largest_at == ()


def test_the_report_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tlcore.__main__ import main

    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    changed[2, 3] = math.nan
    a, b = (emitted(str(tmp_path), {"x": each}) for each in (values, changed))
    assert main(["compare", a, b]) == 1
    said = capsys.readouterr().out
    assert f"largest difference: at [2, 3], {float(values[2, 3]):.6g} against nan" in said
    assert "ulp; percentiles of |A - B|:" in said
    result = tlcore.compare(a, b).to_json()["results"][0]
    assert result["measures"]["largest_at"] == [2, 3] and result["measures"]["largest"][1] == "nan"
    assert len(result["details"]["percentiles"]) == len(PERCENTILES)


def test_only_the_first_differences_are_read_again(tmp_path: Path) -> None:
    sides = [{f"{at:02}": torch.full((3,), float(at + side)) for at in range(30)} for side in (0, 1)]
    found = tlcore.compare(*(emitted(str(tmp_path), side) for side in sides))
    assert [each.details is not None for each in found.results] == [True] * 20 + [False] * 10
