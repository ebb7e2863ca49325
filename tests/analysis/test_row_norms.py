"""One wrong row of a large tensor is found by norm, and rounding alone is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import tlcore
from tlcore.__main__ import main
from tlcore.analysis import measure as measuring
from tlcore.analysis.measure import Tolerance, measure
from tlcore.analysis.row_norms import RowNorms

BY_NORM = Tolerance(norm=True)


def _states(rows: int = 500) -> torch.Tensor:
    """Like a model's hidden states: the first row is far larger than all others."""
    states = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    states[0] *= 100
    return states


@pytest.mark.parametrize("chunk", [1 << 17, 100, 7])
@pytest.mark.parametrize("special", [False, True])
def test_a_wrong_row_is_found(chunk: int, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CHUNK", chunk)
    exact = _states(60)
    if special:
        exact[3, 5] = math.inf
    rounded = exact.bfloat16()
    clean = measure(rounded, exact, Tolerance().between(torch.bfloat16, torch.float32))
    assert clean.agrees and clean.worst_row_l2 is not None and clean.worst_row_l2 < 0.01
    wrong = rounded.clone()
    wrong[41] = rounded[42]
    found = measure(wrong, exact, BY_NORM)
    assert found.worst_row == 41 and found.worst_row_l2 == pytest.approx(
        float((exact[42] - exact[41]).norm() / exact[41].norm()), rel=0.01
    )
    assert not found.agrees


def test_the_whole_tensors_norm_hides_it() -> None:
    exact = _states()
    wrong = exact.clone()
    wrong[41] = exact[42]
    found = measure(wrong.bfloat16(), exact, Tolerance().between(torch.bfloat16, torch.float32))
    assert found.rel_l2 is not None and found.rel_l2 < 1.6e-2
    assert not found.agrees


def test_a_row_that_is_nearly_zero_is_held_against_the_median_row() -> None:
    exact = _states()
    exact[9] = 1e-3
    noisy = exact + 1e-3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    assert measure(noisy, exact, Tolerance(1e-2, 0, norm=True)).agrees


def test_rows_of_zeros() -> None:
    exact = torch.zeros(40, 8)
    exact[3] = 1
    assert measure(exact.clone(), exact, BY_NORM).agrees
    wrong = exact.clone()
    wrong[30, 2] = 1e-2
    found = measure(wrong, exact, Tolerance(1e-2, 1e-5, norm=True))
    assert (found.worst_row, found.worst_row_l2, found.agrees) == (30, math.inf, False)


def test_nothing_is_near() -> None:
    assert RowNorms(4).worst(0.1, 0.1) == (0, 0.0, True)


def test_a_comparison_of_two_dtypes_names_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = _states()
    wrong = exact.bfloat16()
    wrong[41] = wrong[42]
    urls = {}
    for name, tensor in (("clean", exact.bfloat16()), ("wrong", wrong), ("exact", exact)):
        model = torch.nn.Identity()
        with tlcore.capture(model, output_dir=str(tmp_path / name)) as captured:
            model(tensor)
        urls[name] = captured.url
    assert main(["compare", urls["clean"], urls["exact"]]) == 0
    capsys.readouterr()
    assert main(["compare", urls["wrong"], urls["exact"]]) == 1
    assert "row 41 is off by 1." in " ".join(capsys.readouterr().out.split())
