"""The map of modules and tokens: its cells, and the picture in headless Chromium by pointer and keyboard."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tlcore
from tests.browser import opened
from tlcore.__main__ import main
from tlcore.analysis.report.map_section import map_section
from tlcore.analysis.report.token_map import BROKEN, EQUAL, MOST, UNKNOWN, maps, quantised

LENGTH = 9


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            x = x + layer(x).tanh()
            if at == 2:
                x = self.spoil(x)
        return x


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    def capture(spoil: Any = None) -> str:
        torch.manual_seed(0)
        model = Model()
        model.spoil = spoil or model.spoil
        x = torch.randn(2, LENGTH, 16)
        with tlcore.capture(model, output_dir=str(tmp_path)) as captured, captured.step(rows=["a", "b"]):
            model(x)
        return captured.url

    return capture


def one_token(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[1, 4] *= 1.5
    return x


def not_a_number(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 7, 3] = torch.nan
    return x


def field(found: dict[str, Any]) -> Any:
    cells = np.frombuffer(base64.b64decode(found["cells"]), np.uint8)
    return cells.reshape(len(found["modules"]), found["columns"])


def test_a_cell_tells_which_token_of_which_module(run: Callable[..., str]) -> None:
    a = run()
    first, second = maps(tlcore.compare(a, run(one_token)))
    assert (first["name"], second["name"]) == ("step 0, request a", "step 0, request b")
    assert (field(first) == EQUAL).all() and first["marked"] is None
    cells = field(second)
    assert second["modules"][second["marked"]] == "layers.3 inputs[0]"
    rows = dict(zip(second["modules"], cells, strict=True))
    assert (rows["layers.2 outputs"] == EQUAL).all()
    for name in ("layers.3 inputs[0]", "layers.3 outputs", "layers.4 outputs", "_root outputs"):
        assert [at for at, cell in enumerate(rows[name]) if cell != EQUAL] == [4], name
    broken = field(maps(tlcore.compare(a, run(not_a_number)))[0])
    assert [at for at, cell in enumerate(broken[-1]) if cell == BROKEN] == [7]


def test_sizes_keep_their_order_and_many_rows_their_largest() -> None:
    sizes = np.array([0.0, 1e-12, 1e-7, 1e-3, 1.0, 1e6, np.nan])
    cells = quantised(sizes)
    assert cells[0] == EQUAL and cells[-1] == BROKEN and cells[-2] == MOST
    assert (np.diff(cells[:-1].astype(int)) > 0).all()
    many = np.zeros(10_000)
    many[6_000] = 1.0
    cells = quantised(many)
    assert len(cells) == 256 and np.flatnonzero(cells).tolist() == [6_000 * 256 // 10_000]


def test_runs_without_rows_have_rows_of_tensors(tmp_path: Path) -> None:
    urls = []
    for scale in (1.0, 1.01):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.get_submodule("1").get_parameter("bias").data *= scale
        with tlcore.capture(model, output_dir=str(tmp_path), log_token_ids=False) as captured:
            model(torch.randn(3, 4))
        urls.append(captured.url)
    (found,) = maps(tlcore.compare(*urls))
    assert found["unit"] == "row" and found["columns"] == 3
    assert (field(found) != UNKNOWN).all() and (field(found)[-1] != EQUAL).all()
    assert map_section(tlcore.compare(*urls)).count("<canvas") == 1


@pytest.mark.slow
def test_the_map_in_a_browser(run: Callable[..., str], tmp_path: Path) -> None:
    report, picture = tmp_path / "report.html", tmp_path / "map.png"
    assert main(["compare", run(), run(one_token), "--format", "html", "--output", str(report)]) == 1
    with opened(report) as (page, troubles):
        page.screenshot(path=picture)
        # The map of the first divergence is shown, at its row.
        assert page.locator("#which option").all_inner_texts() == ["step 0, request a", "step 0, request b"]
        assert page.locator("#cell").inner_text() == "layers.3 inputs[0], position 0: equal"
        page.locator("#goto").click()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        told = page.locator("#cell").inner_text()
        assert told.startswith("layers.3 inputs[0], position 4: 0.") and told.endswith("relative error")
        page.keyboard.press("ArrowDown")
        assert page.locator("#cell").inner_text().startswith("layers.3 outputs, position 4: ")
        page.keyboard.press("Enter")
        assert page.locator("#filter").input_value() == "layers.3 outputs"
        assert all("layers.3" in line for line in page.locator("tbody tr").all_inner_texts())
        # The pointer reads the same cell, whose colour is none of its neighbours'.
        pixel = "(x) => [...map.getContext('2d').getImageData(x * 24 + 12, 3 * 12 + 6, 1, 1).data].join()"
        colours = [page.evaluate(pixel, at) for at in range(LENGTH)]
        assert len(set(colours)) == 2 and colours.count(colours[4]) == 1
        page.locator("#map").click(position={"x": 4 * 24 + 5, "y": 3 * 12 + 5})
        assert "position 4" in page.locator("#cell").inner_text()
        page.locator("#which").select_option("0")
        assert page.locator("#cell").inner_text().endswith("equal")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert troubles == []


def test_many_tensors_are_mapped_fast(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Identity() for _ in range(1500))
            self.scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for at, layer in enumerate(self.layers):
                x = layer(x * self.scale + at % 7)
            return x

    urls = []
    for scale in (0.5, 0.5001):
        model = Many(scale)
        with tlcore.capture(model, output_dir=str(tmp_path), backend="safetensors") as captured:
            model(torch.ones(32, 8))
        urls.append(captured.url)
    comparison = tlcore.compare(*urls)
    began = time.process_time()
    text = map_section(comparison)
    assert time.process_time() - began < 10
    assert 50_000 < len(text) < 1_000_000
