"""What the tree of modules says of each: its worst tensor, how many it has, how many do not agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore
from tlcore.analysis.report.module_tree import cells_of, counted
from tlcore.analysis.report.token_map import BROKEN, EQUAL, MOST, UNKNOWN


def runs(tmp_path: Path, *changes: Any) -> list[str]:
    urls = []
    for change in changes:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        change(model)
        with tlcore.capture(model, output_dir=str(tmp_path)) as captured:
            model(torch.ones(3, 4))
        urls.append(captured.url)
    return urls


def unchanged(model: Any) -> None:
    """The model as it is."""


def not_a_number(model: Any) -> None:
    model[1].bias.data[2] = torch.nan


def without_last(model: Any) -> None:
    model[1].bias.data[2] += 0.5
    del model[2]


def test_the_worst_tensor_and_what_does_not_agree(tmp_path: Path) -> None:
    a, b, c = runs(tmp_path, unchanged, not_a_number, without_last)
    assert counted(tlcore.compare(a, b)) == {
        "0": [EQUAL, 2, 0],
        # The output of the first is the input of the second, and the second's that of the third.
        "1": [BROKEN, 2, 1],
        "2": [BROKEN, 2, 2],
        "": [BROKEN, 2, 1],
    }
    found = counted(tlcore.compare(a, c))
    # What one run alone has does not agree, and has no size.
    assert found["2"] == [UNKNOWN, 2, 2]
    assert EQUAL < found["1"][0] < MOST and found["1"][1:] == [2, 1]


def test_noise_is_the_unit_where_there_is_some(tmp_path: Path) -> None:
    def by(shift: float) -> Any:
        return lambda model: model[0].bias.data.add_(shift)

    a, b, noise = runs(tmp_path, unchanged, by(0.1), by(0.001))
    plain, in_noise = (cells_of(found) for found in (tlcore.compare(a, b), tlcore.compare(a, b, noise=noise)))
    assert max(in_noise) > max(plain) > EQUAL
    first = tlcore.compare(a, b, noise=noise).first_divergence
    assert first is not None and first.result.noise is not None and first.result.noise.units > 10
