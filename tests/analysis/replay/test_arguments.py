"""Which call is replayed, with which arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.replay.layers import made
from tests.analysis.replay.test_replay import SPEC, X, captured
from tlcore.__main__ import main
from tlcore.reader import MissingError


def test_a_call_without_its_step_is_told_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = captured(tmp_path, made())
    assert main(["replay", url, "first", "--module", SPEC]) == 2
    assert "'first' names no call of a step. Write step_0/first." in capsys.readouterr().err


def test_an_argument_is_replaced_by_its_name_also_where_it_was_given_by_position(tmp_path: Path) -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor, by: float = 1.0, *, plus: float = 0.0) -> torch.Tensor:
            return x * by + plus

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = Scales()

        def forward(self, x: torch.Tensor) -> Any:
            return self.scales(x, 2.0)

    model = Calls()
    url = captured(tmp_path, model)
    ways: list[dict[int | str, Any]] = [{"by": 3.0, "plus": 1.0}, {1: 3.0, "plus": 1.0}]
    for replace in ways:
        found = tlcore.replay(url, "step_0/scales", model.scales, replace=replace)
        assert torch.equal(found.output, X * 3 + 1) and not found.equal
    with pytest.raises(MissingError, match=r"scales: Scales: no argument 'bye'; did you mean 'by'\?"):
        tlcore.replay(url, "step_0/scales", model.scales, replace={"bye": 3.0})
