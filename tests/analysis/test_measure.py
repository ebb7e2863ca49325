"""The measures against their definitions, for all kinds of values."""

from __future__ import annotations

import math

import pytest
import torch

from tlcore.analysis.measure import EXACT, Tolerance, measure


def test_measures_are_what_their_names_say() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 0.0])
    found = measure(a, b, Tolerance(0, 1.0))
    assert found.max_abs == 3.0
    assert found.max_rel == pytest.approx(0.2)
    assert found.mismatched == pytest.approx(1 / 3)
    assert found.mean_abs == pytest.approx(3.5 / 3)
    assert found.rms == pytest.approx(math.sqrt(9.25 / 3))
    assert found.rel_l2 == pytest.approx(math.sqrt(9.25 / 7.25))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_default_tolerances_agree_with_assert_close(dtype: torch.dtype) -> None:
    a = torch.linspace(0.1, 4, 50).to(dtype)
    for factor in (0.5, 0.9, 1.1, 2.0):
        b = (a.double() * (1 + factor * Tolerance().of(dtype, dtype)[0])).to(dtype)
        ours = measure(b, a, Tolerance()).mismatched == 0
        try:
            torch.testing.assert_close(b, a)
            theirs = True
        except AssertionError:
            theirs = False
        assert ours == theirs


def test_special_values() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, nan, inf, inf, -inf, 1.0])
    b = torch.tensor([nan, 0.0, inf, -inf, 2.0, 1.0])
    found = measure(a, b, Tolerance())
    assert found.mismatched == 0.5
    assert (found.nans, found.infs) == ((2, 1), (3, 2))
    assert not measure(torch.tensor([0.0]), torch.tensor([-0.0]), Tolerance()).bitwise


def test_integers_are_exact() -> None:
    big = torch.tensor([1 << 60])
    assert measure(big, big + 1, Tolerance()).mismatched == 1
    one, other = (torch.tensor([(1 << 63) + number], dtype=torch.uint64) for number in (5, 6))
    found = measure(one, other, Tolerance())
    assert (found.mismatched, found.max_abs) == (1, 1)
    assert measure(torch.tensor([True]), torch.tensor([True]), Tolerance()).bitwise


def test_empty_scalar_and_large_tensors() -> None:
    empty = measure(torch.empty(0, 2), torch.empty(0, 2), Tolerance())
    assert empty.bitwise and empty.mismatched == 0
    assert measure(torch.tensor(2.0), torch.tensor(2.0), Tolerance()).max_abs == EXACT.max_abs
    large = torch.ones((1 << 20) + 3)
    other = large.clone()
    other[-1] = 2
    assert measure(large, other, Tolerance()).mismatched == pytest.approx(1 / large.numel())
    with pytest.raises(ValueError, match="differ"):
        measure(torch.ones(2), torch.ones(3), Tolerance())
