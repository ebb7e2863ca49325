"""Runs stored as int8 with a scale a row: what rounding leaves is no fault, and what is more is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.analysis.emitting import emitted
from tests.analysis.matching.test_fused import _pair
from tlcore.analysis.measure import CHUNK, Sums, Tolerance
from tlcore.layout.row_scale import restored

INT8 = {"store_dtype": "int8"}


def rows(count: int, width: int, outliers: bool, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    found = torch.randn(count, width, generator=made)
    # Rows of very different sizes, as of the first token beside the others.
    found *= torch.logspace(-1, 3, count)[:, None]
    if outliers:
        found[:, 3] *= 100
    return found


def agree(a: torch.Tensor, b: torch.Tensor, directory: Path, both: bool = False, **keys: object) -> bool:
    one = emitted(str(directory), {"x": a}, **INT8, **keys)
    other = emitted(str(directory), {"x": b}, **(INT8 if both else {}), **keys)
    found = tlcore.compare(one, other), tlcore.compare(other, one)
    assert found[0].equal == found[1].equal
    return found[0].equal


@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [64, 4096])
def test_rounding_is_no_fault(tmp_path: Path, dtype: torch.dtype, outliers: bool, width: int) -> None:
    x = rows(6, width, outliers).to(dtype)
    assert agree(x, x, tmp_path)
    assert agree(x, x * (1 + 1e-7), tmp_path, both=True)
    odd = x.clone()
    odd[1, 5], odd[2, 6], odd[4] = torch.nan, -torch.inf, 0
    assert agree(odd, odd, tmp_path)


@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("both", [False, True])
def test_a_fault_of_a_fortieth_of_one_row_is_one(tmp_path: Path, row: int, both: bool) -> None:
    x = rows(6, 1024, False)
    for kind in range(3):
        wrong = x.clone()
        if kind == 0:
            wrong[row] *= 1.04 if both else 1.025
        elif kind == 1:
            wrong[row, 7] += 1.5 * float(x[row].std())
            wrong[row, 9] -= 1.5 * float(x[row].std())
        else:
            wrong[row] += (0.04 if both else 0.025) * float(x[row].std())
        assert not agree(x, wrong, tmp_path, both), kind
    x[row, 7] += 0.2 * float(x[row].std())
    assert agree(x, rows(6, 1024, False), tmp_path, both)


def test_a_fault_of_the_whole_is_one(tmp_path: Path) -> None:
    x = rows(40, 512, False)
    assert not agree(x, x * 1.02, tmp_path)
    assert agree(x, x * 1.001, tmp_path)


def test_of_rows_that_end_within_a_chunk_each_has_its_own_steps() -> None:
    width = 1000
    count = 2 * CHUNK // width + 3
    x = rows(count, width, True)
    step = x.abs().amax(-1, keepdim=True) / 127
    packed = torch.cat([(x / step).round().to(torch.int8), step.view(torch.int8)], -1)
    coarse = restored(packed, "float32")
    for at in (None, 0, CHUNK // width, count - 1):
        wrong = coarse.clone()
        if at is not None:
            wrong[at] += 1.2 * step[at]
        sums = Sums(Tolerance(norm=True), x.dtype, x.dtype, x.shape, (False, True))
        for begin in range(0, x.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            sums.add(x.flatten()[part], wrong.flatten()[part])
        assert sums.measures().agrees == (at is None)
        assert at is None or sums.measures().worst_row == at


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("fault", [False, True])
def test_a_part_of_a_fused_row_has_the_steps_of_the_whole(tmp_path: Path, side: int, fault: bool) -> None:
    one, several = _pair()
    with torch.no_grad():
        # The queries are a hundred times as large, so that in one row the keys are rounded to their steps.
        one.qkv_proj.weight[:8] *= 100  # type: ignore[union-attr, index, operator]
        several.q_proj.weight *= 100  # type: ignore[union-attr, operator]
        several.k_proj.bias += 3 if fault else 0  # type: ignore[union-attr, operator]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    urls = []
    for model, store_dtype in ((one, "int8"), (several, None)):
        keys: dict[str, Any] = {"output_dir": str(tmp_path), "store_dtype": store_dtype}
        with torch.no_grad(), tlcore.capture(model, module_call_match="[qkv]_proj", **keys) as capture:
            model(x)
        urls.append(str(capture.url))
    found = tlcore.compare(urls[side], urls[1 - side], ignore_missing=True)
    wrong = [each.module for each in found.results if not each.agrees]
    names = {each.module for each in found.results if each.direction == "outputs"}
    assert names == {"q_proj", "k_proj", "v_proj"} and wrong == (["k_proj"] if fault else [])


def test_what_was_asked_for_holds_as_ever(tmp_path: Path) -> None:
    x = rows(4, 64, False)
    urls = emitted(str(tmp_path), {"x": x}, **INT8), emitted(str(tmp_path), {"x": x})
    assert not tlcore.compare(*urls, rtol=1e-6, atol=0).equal
    assert tlcore.compare(*urls, rtol=0.1, by_norm=True).equal
    assert tlcore.compare(*urls, rules={"tolerances": [{"match": "x", "norm": 0.1}]}).equal
