"""`tlcore stats`: statistics in order of execution, and where NaN and Inf begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.emitting import emitted
from tlcore.__main__ import main
from tlcore.analysis.measure import CHUNK
from tlcore.errors import ReadError
from tlcore.statistics.stored import summarize


class Spoil(nn.Module):
    """Passes its input on with one value replaced."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spoiled = x.clone()
        spoiled[0, 0] = self.value
        return spoiled


def _captured(tmp_path: Path, model: nn.Module, x: torch.Tensor, **keys: Any) -> str:
    with tlcore.capture(
        model, output_dir=str(tmp_path), log_step_ids=[], **{"module_call_match": ".", **keys}
    ) as captured:
        for _ in range(2):
            model(x)
    return captured.url


def test_nan_and_inf_are_seen_where_they_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Identity(), Spoil(torch.inf), nn.Identity(), Spoil(torch.nan), nn.Identity())
    run = _captured(tmp_path, model, torch.ones(2, 3))
    survey = tlcore.stats(run)
    nan, inf = survey.first_nan, survey.first_inf
    assert nan is not None and inf is not None
    assert (inf.tensor.module, inf.tensor.step, inf.tensor.direction, inf.count) == ("1", 0, "outputs", 1)
    assert (nan.tensor.module, nan.born, inf.born) == ("3", True, True)
    assert main(["stats", run]) == 0
    culprit, first, second, *_ = capsys.readouterr().out.splitlines()
    assert culprit == (
        "NaN or Inf come from 1 in step 0: its inputs are finite, its outputs hold 1 Inf;"
        " then in 7 further calls, in 2 steps to 1"
    )
    assert (
        first
        == "NaN first seen in 3, outputs of step 0 (1 of 6 values); born here: its inputs are free of it"
    )
    assert second.startswith("Inf first seen in 1, outputs of step 0")
    assert main(["stats", run, "--json", "--steps", "1", "--modules", "^4$"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["first_nan"] == {
        "step": 1,
        "module": "4",
        "call": 0,
        "direction": "inputs",
        "name": "step_1/4/inputs_0_cpu",
        "count": 1,
        "born": False,
        "within": None,
        "within_call": 0,
    }
    assert [tensor["values"]["nans"] for tensor in document["tensors"]] == [1, 1]


def test_statistics_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    values = {
        "large": torch.randn(2 * CHUNK + 7) + 3,
        "half": torch.randn(5, 5).bfloat16(),
        "empty": torch.empty(0),
        "complex": torch.randn(9, dtype=torch.complex64),
        "whole": torch.arange(7),
    }
    survey = tlcore.stats(emitted(str(tmp_path), values))
    assert {tensor.path[0] for tensor in survey.tensors} == values.keys()
    for tensor in survey.tensors:
        found, expected = tensor.values, summarize(values[str(tensor.path[0])])
        assert found is not None
        assert found.mean == pytest.approx(expected.mean) and found.std == pytest.approx(expected.std)
        assert (found.min, found.max, found.zeros) == (expected.min, expected.max, expected.zeros)
    frame = survey.to_pandas()
    assert len(frame) == 5 and {"mean", "std", "nans"} <= set(frame.columns)
    assert "no NaN and no Inf" in survey._repr_html_()


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = emitted(
        str(tmp_path), {"x": torch.ones(3), "y": torch.zeros(4), "big": torch.ones(99)}, max_tensor_size=9
    )
    next(Path(run).rglob("*_x_*.pt")).unlink()
    assert main(["stats", run]) == 1
    said = capsys.readouterr().out
    assert said.startswith("1 tensors cannot be read\nno NaN and no Inf in what could be read")
    assert "1 tensors were skipped at capture" in said
    assert main(["stats", str(tmp_path / "nothing")]) == 2
    with pytest.raises(ReadError, match="no tensor to look at"):
        tlcore.stats(run, modules=["nothing"])
    assert "there is no step 7" in " ".join(tlcore.stats(run, steps=[0, 7]).notes)
