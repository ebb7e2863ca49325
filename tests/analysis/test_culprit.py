"""NaN and infinities together: which call made the first, and that a mask made none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore

X = torch.rand(1, 4, 8) + 0.5
MASK = torch.full((4, 4), float("-inf")).triu(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.norm(self.up(torch.softmax(x @ x.mT + mask, -1) @ x))


class Model(nn.Module):
    def __init__(self, scale: float = 1.0, own: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.own = own
        with torch.no_grad():
            self.get_parameter("blocks.1.up.weight").fill_(scale)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        return x + self.own


def url(model: nn.Module, path: Path, x: torch.Tensor = X, mask: torch.Tensor = MASK, **keys: Any) -> str:
    with torch.inference_mode(), tlcore.capture(model, output_dir=str(path), **keys) as capture:
        model(x, mask)
    return capture.url


@pytest.mark.parametrize("capture", ["tensor", "stats", "both"])
def test_the_call_that_made_it_is_named_and_no_mask(tmp_path: Path, capture: str) -> None:
    survey = tlcore.stats(url(Model(torch.inf), tmp_path, capture=capture))
    found = survey.culprit
    assert found is not None and (found.module, found.call, found.step) == ("blocks.1.up", 0, 0)
    assert survey.verdict()[0].startswith("NaN or Inf come from blocks.1.up in step 0: its inputs are finite")
    assert survey.first_inf is None or survey.first_inf.tensor.direction == "outputs"
    assert survey.to_json()["culprit"]["module"] == "blocks.1.up"


def test_the_models_own_code_can_be_it(tmp_path: Path) -> None:
    found = tlcore.stats(url(Model(own=torch.nan), tmp_path)).culprit
    assert found is not None and found.module == "" and "come from _root in step 0" in str(found)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nobody_is_accused_of_what_came_in(tmp_path: Path, bad: float) -> None:
    x = X.clone()
    x[0, 0, 0] = bad
    assert tlcore.stats(url(Model(), tmp_path, x)).culprit is None


def test_a_sound_run_has_none(tmp_path: Path) -> None:
    survey = tlcore.stats(url(Model(), tmp_path))
    assert survey.culprit is None and survey.verdict()[0] == "no NaN and no Inf"


def test_minus_infinity_that_a_call_made_is_no_mask(tmp_path: Path) -> None:
    class Spoils(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x > 1, 0.0, -torch.inf)

    model = nn.Sequential(nn.Identity(), Spoils(), nn.Softmax(0))
    with tlcore.capture(model, output_dir=str(tmp_path)) as capture:
        model(torch.zeros(2))
    found = tlcore.stats(capture.url).culprit
    assert found is not None and found.module == "1"


@pytest.mark.parametrize("capture", ["tensor", "both"])
def test_a_mask_does_not_arm_the_condition(tmp_path: Path, capture: str) -> None:
    run = url(Model(torch.inf), tmp_path, on_condition="nonfinite", capture=capture)
    kept = {name.split("/")[1] for name in tlcore.open_run(run).step(0)}
    assert "blocks.1.up" in kept and not any(call.startswith("blocks.0") for call in kept)


def test_compare_names_it_for_the_run_that_has_it(tmp_path: Path) -> None:
    runs = [url(Model(scale), tmp_path / str(scale)) for scale in (1.0, torch.inf)]
    found = tlcore.compare(*runs)
    assert [(label, each.module) for label, each in found.culprits] == [("B", "blocks.1.up")]
    assert found.to_json()["culprits"]["B"]["module"] == "blocks.1.up"
