"""What has no row per token: the same for all samples of a batch, or one row for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tlcore

SIZE, LENGTH = 16, 5


class Positions(nn.Module):
    """What depends on positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = (torch.arange(x.shape[1]) + self.offset)[None, :, None] * torch.linspace(0.1, 1, SIZE)
        return angles.cos()


class Pooler(nn.Module):
    """One vector for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.at = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.at].clone()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer, self.pooler = Positions(), nn.Linear(SIZE, SIZE), Pooler()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.pooler(self.layer(x) * self.positions(x))
        return pooled


@pytest.fixture
def run(tmp_path: Any) -> Callable[..., str]:
    def capture(order: str, **changed: Any) -> str:
        torch.manual_seed(0)
        model = Model().double()
        for name, value in changed.items():
            part, _, attribute = name.partition("_")
            setattr(getattr(model, part), attribute, value)
        x = torch.stack([torch.sin(torch.arange(LENGTH * SIZE).double() + ord(each)) for each in order])
        with (
            tlcore.capture(model, output_dir=str(tmp_path)) as captured,
            captured.step(rows=list(order)),
        ):
            model(x.view(len(order), LENGTH, SIZE))
        return captured.url

    return capture


@pytest.mark.parametrize(("mine", "other"), [("ab", "cab"), ("a", "bac"), ("abc", "c")])
def test_both_are_compared_between_batches_of_other_sizes(
    mine: str, other: str, run: Callable[..., str]
) -> None:
    a = run(mine)
    found = tlcore.compare(a, run(other), rtol=1e-9, ignore_missing=True)
    assert found.equal and not any("were not compared" in note for note in found.notes)
    modules = {each.module for each in found.results}
    assert {"positions", "layer", "pooler", ""} == modules
    requests = {each.request for each in found.results if each.module == "pooler"}
    assert requests == set(mine) & set(other)

    first = tlcore.compare(a, run(other, positions_offset=0.1), ignore_missing=True).first_divergence
    assert first is not None and (first.module, first.direction, first.born) == ("positions", "outputs", True)
    first = tlcore.compare(a, run(other, pooler_at=0), ignore_missing=True).first_divergence
    assert first is not None and (first.module, first.direction, first.born) == ("pooler", "outputs", True)


def test_as_many_samples_in_other_places_leave_it_open(run: Callable[..., str]) -> None:
    found = tlcore.compare(run("ab"), run("ba"))
    assert found.equal and any("were not compared" in note for note in found.notes)
    assert "pooler" not in {each.module for each in found.results if each.direction == "outputs"}
