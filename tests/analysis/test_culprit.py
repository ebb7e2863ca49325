"""NaN and infinities together: which call made the first, and that a mask made none."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tlcore
from tlcore.analysis.culprit import Look, culprit
from tlcore.analysis.report.finite_map import finite_section
from tlcore.analysis.report.token_map import BROKEN, EQUAL, UNKNOWN

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


def looks(rank: int, *calls: tuple[str, bool, bool], step: int = 0) -> list[Look]:
    """The calls of a rank by module: whether what comes in is finite, and what goes out."""
    return [
        Look(step, rank, (step, module), module, 0, direction, int(not fine), 0)
        for module, *both in calls
        for direction, fine in zip(("inputs", "outputs"), both, strict=True)
    ]


def test_a_collective_brings_it_from_the_rank_that_made_it() -> None:
    # Rank 1 makes it in its attention; the sum over ranks in the projection brings it to rank 0.
    zero = looks(0, ("attn", True, True), ("o_proj", True, False), ("mlp", False, False))
    one = looks(1, ("attn", True, False), ("o_proj", False, False), ("mlp", False, False))
    for order in ([*zero, *one], [*one, *zero]):
        found = culprit(order)
        assert found is not None and (found.module, found.ranks, found.reached) == ("attn", (1,), (0, 1))
        assert str(found) == (
            "NaN or Inf come from attn on rank 1 in step 0: its inputs are finite, its outputs hold 1 NaN;"
            " then in 4 further calls, on ranks 0, 1"
        )
        assert found.to_json()["ranks"] == [1]


def test_what_all_ranks_make_alike_is_of_all_of_them() -> None:
    found = culprit([*looks(0, ("a", True, True), ("b", True, False)), *looks(1, ("b", True, False))])
    assert found is not None and found.ranks == (0, 1) and "from b on ranks 0, 1 in step 0" in str(found)
    # Of two that may be it, it is the one that its own rank made earlier.
    early = [*looks(0, ("a", True, True), ("b", True, False)), *looks(1, ("a", True, False))]
    assert (found := culprit(early)) is not None and (found.module, found.ranks) == ("a", (1,))


class Cached(nn.Module):
    """Attention in which what a step made stays for the steps to come, as in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cache = nn.Identity(), Kept()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.cache(self.first(x))
        return result


class Kept(nn.Module):
    total: torch.Tensor | float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + x.log() if x.min() < 0 else self.total + x
        assert isinstance(self.total, torch.Tensor)
        return self.total.clone()


def test_over_a_whole_run_it_is_the_step_that_made_it(tmp_path: Path) -> None:
    model = Cached()
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[]) as capture:
        for sign in (1.0, 1.0, -1.0, 1.0, 1.0):
            model(torch.full((2, 3), sign))
    survey = tlcore.stats(capture.url)
    found = survey.culprit
    assert found is not None and (found.module, found.step, found.steps) == ("cache", 2, (2, 3, 4))
    # The root of its own step, and both in each later one: their inputs are finite, but for what is kept.
    assert survey.verdict()[0].endswith("its outputs hold 6 NaN; then in 5 further calls, in 3 steps to 4")
    picture = finite_section("", survey.looks(), found)
    data = json.loads(re.findall(r'type="application/json">(.*?)</script>', picture)[0])
    cells = np.frombuffer(base64.b64decode(data["cells"]), np.uint8).reshape(len(data["rows"]), -1)
    states = dict(zip(data["rows"], cells.tolist(), strict=True))
    assert states["cache"] == [EQUAL, EQUAL, BROKEN, BROKEN, BROKEN]
    assert states["first"] == [EQUAL] * 5 and UNKNOWN not in cells
    assert (data["rows"][data["marked"]], data["markedColumn"], data["names"]) == ("cache", 2, list("01234"))


def test_a_finite_run_has_no_picture(tmp_path: Path) -> None:
    survey = tlcore.stats(url(Model(), tmp_path))
    assert finite_section("", survey.looks(), survey.culprit) == ""
