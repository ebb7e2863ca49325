"""The HTML reports in headless Chromium: self-contained, without errors, and filtering as they say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.browser import opened
from tlcore.__main__ import main

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.linear = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.linear(self.norm(x)).relu()
        return result


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], str]:
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))

    def run(module: nn.Module) -> str:
        with tlcore.capture(module, output_dir=str(tmp_path_factory.mktemp("out"))) as captured:
            module(x)
        return captured.url

    return run


@pytest.fixture(scope="module")
def runs(dump: Callable[[nn.Module], str]) -> tuple[str, str]:
    """A run, and one with another epsilon and a NaN further on."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block() for _ in range(12)))
    changed = copy.deepcopy(model)
    changed[4].norm.eps = 0.01
    changed[9].linear.bias.data[7] = torch.nan
    return dump(model), dump(changed)


def _visible(page: Any) -> list[str]:
    lines: list[str] = page.locator("tbody tr").all_inner_texts()
    return lines


def test_the_comparison_in_a_browser(runs: tuple[str, str], tmp_path: Path) -> None:
    report, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert main(["compare", *runs, "--format", "html", "--output", str(report)]) == 1
    with opened(report) as (page, troubles):
        page.screenshot(path=picture, full_page=True)
        assert (
            "first divergence: 4.norm, outputs of step 0; born here" in page.locator(".verdict").inner_text()
        )
        # The error by layer, and histograms and heatmap of the worst tensors, all of them visible.
        charts = [chart.bounding_box() for chart in page.locator("svg").all()]
        assert len(charts) == 5
        assert all(box["width"] > 900 and box["height"] > 150 for box in charts)
        titles = page.locator("h3").all_inner_texts()
        assert titles[0] == "step 0: 4.norm outputs"
        differing = _visible(page)
        assert differing and all("different" in line for line in differing)
        page.locator("#only").uncheck()
        assert len(_visible(page)) == 74
        page.locator("#filter").fill("3.norm outputs")
        (line,) = _visible(page)
        assert "bitwise" in line
        page.locator("#filter").fill("")
        page.locator("th", has_text="max abs").click()
        largest = [float(row.split("\t")[4]) for row in _visible(page)]
        assert largest == sorted(largest, reverse=True)
        # Nothing hangs over the edge of the page.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert troubles == []
    assert picture.stat().st_size > 50_000


def test_equal_runs_in_a_browser(runs: tuple[str, str], tmp_path: Path) -> None:
    report = tmp_path / "equal.html"
    assert main(["compare", runs[0], runs[0], "--format", "html", "--output", str(report)]) == 0
    with opened(report) as (page, troubles):
        assert page.locator(".verdict").inner_text().startswith("the runs agree")
        assert len(_visible(page)) == 74
    assert troubles == []


def test_the_statistics_in_a_browser(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "stats.html"
    assert main(["stats", runs[1], "--html", str(report)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NaN or Inf come from 9.linear in step 0: its inputs are finite")
    assert "\nNaN first seen in 9.linear, outputs of step 0 (24 of 1152 values); born here" in said
    with opened(report) as (page, troubles):
        page.screenshot(path=tmp_path / "stats.png", full_page=True)
        assert "NaN first seen in 9.linear" in page.locator(".verdict").inner_text()
        assert page.locator("svg").count() == 1
        with_nan = len(_visible(page))
        page.locator("#only").uncheck()
        assert 0 < with_nan < len(_visible(page)) == 74
    assert troubles == []
