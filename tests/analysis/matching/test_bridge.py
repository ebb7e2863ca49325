"""What differs in structure between two implementations: split residuals, other paths, skipped tensors."""

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

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class AddNorm(nn.Module):
    """As vLLM's: takes hidden state and residual, returns the normed sum and the sum."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        total = hidden + residual
        return total / 2, total


class Norm(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / 2


class SplitLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = AddNorm()

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        normed, total = self.input_layernorm(
            hidden, torch.zeros_like(hidden) if residual is None else residual
        )
        return normed * 3, total


class WholeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = Norm()

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return (self.input_layernorm(hidden) * 3 + hidden,)


class SplitModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SplitLayer(), SplitLayer()])

    def forward(self, x: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            x, residual = layer(torch.arange(len(x)), x, residual)
        return x


class WholeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WholeLayer(), WholeLayer()])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            (x,) = layer(x.unsqueeze(0) if x.dim() == 2 else x, attention_mask=torch.ones(1, 3))
        return x


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    urls = []
    for model in (SplitModel(), WholeModel()):
        with tlcore.capture(
            model, module_call_match=".", output_dir=str(tmp_path_factory.mktemp("out"))
        ) as captured:
            model(X)
        urls.append(captured.url)
    return urls[0], urls[1]


def test_both_inputs_and_outputs_are_added(runs: tuple[str, str]) -> None:
    for pair in (runs, runs[::-1]):
        found = tlcore.compare(*pair, sums=[0, 1], ignore_missing=True)
        assert found.equal, str(found)
        seen = {(result.module, result.direction) for result in found.results}
        layers = {f"layers.{i}{part}" for i in (0, 1) for part in ("", ".input_layernorm")}
        assert seen == {(layer, direction) for layer in layers for direction in ("inputs", "outputs")}
        (note,) = found.notes
        assert "only one run has were left out" in note


def test_what_remains_on_one_side_is_missing(runs: tuple[str, str]) -> None:
    found = tlcore.compare(*runs, sums=[0, 1])
    assert not found.equal and found.first_divergence is None
    assert {result.path[0] for result in found.results if not result.agrees} == {0, "attention_mask"}
    assert "tensors are missing" in str(found)


def test_without_the_sum_the_parts_differ(runs: tuple[str, str]) -> None:
    assert tlcore.compare(*runs, ignore_missing=True).first_divergence is not None


def test_the_norm_judges_a_tensor_as_a_whole(tmp_path: Path) -> None:
    a = torch.full((100,), 1.0)
    b = a.clone()
    b[0] = 1.05
    one, other = (emitted(str(tmp_path), {"x": values}) for values in (a, b))
    assert not tlcore.compare(one, other, rtol=0.01, atol=0).equal
    assert tlcore.compare(one, other, rtol=0.01, atol=0, by_norm=True).equal
    assert not tlcore.compare(one, other, rtol=0.004, atol=0, by_norm=True).equal
    b[1] = torch.nan
    broken = emitted(str(tmp_path), {"x": b})
    assert not tlcore.compare(one, broken, rtol=0.01, atol=0, by_norm=True).equal


def test_a_skipped_tensor_counts_as_something_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"small": torch.ones(3), "big": torch.ones(100)}
    stored, skipped = emitted(str(tmp_path), values), emitted(str(tmp_path), values, max_tensor_size=50)
    without = emitted(str(tmp_path), {"small": values["small"]})
    for pair in ((stored, skipped), (skipped, stored), (skipped, without), (without, skipped)):
        found = tlcore.compare(*pair)
        (missing,) = (result for result in found.results if not result.agrees)
        assert (missing.status, missing.path) == ("missing", ("big",))
        assert main(["compare", *pair]) == 1
    assert "did not store it: " in str(tlcore.compare(skipped, without).results[-1].reason)
    both = tlcore.compare(skipped, skipped)
    assert both.equal
    assert both.notes[0] == "1 tensors were stored by neither run and cannot be compared"
    capsys.readouterr()
    assert main(["compare", skipped, without, "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["counts"]["missing"] == 1
