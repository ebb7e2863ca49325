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
from tests.engine.samples import llama, padded
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
    return cells.reshape(len(found["rows"]), found["columns"])


def test_a_cell_tells_which_token_of_which_module(run: Callable[..., str]) -> None:
    a = run()
    (first, second), count = maps(tlcore.compare(a, run(one_token)))
    assert count == 2
    assert (first["name"], second["name"]) == ("step 0, request a", "step 0, request b")
    assert (field(first) == EQUAL).all() and first["marked"] is None
    cells = field(second)
    assert second["rows"][second["marked"]] == "layers.3 inputs[0]"
    rows = dict(zip(second["rows"], cells, strict=True))
    assert (rows["layers.2 outputs"] == EQUAL).all()
    for name in ("layers.3 inputs[0]", "layers.3 outputs", "layers.4 outputs", "_root outputs"):
        assert [at for at, cell in enumerate(rows[name]) if cell != EQUAL] == [4], name
    broken = field(maps(tlcore.compare(a, run(not_a_number)))[0][0])
    assert [at for at, cell in enumerate(broken[-1]) if cell == BROKEN] == [7]


def test_sizes_keep_their_order() -> None:
    cells = quantised(np.array([0.0, 1e-12, 1e-7, 1e-3, 1.0, 1e6, np.nan]))
    assert cells[0] == EQUAL and cells[-1] == BROKEN and cells[-2] == MOST
    assert (np.diff(cells[:-1].astype(int)) > 0).all()


def test_many_rows_share_columns_by_their_largest(tmp_path: Path) -> None:
    urls = []
    for spoiled in (False, True):
        x = torch.ones(10_000, 2)
        x[6_000] += spoiled
        model = nn.Sequential(nn.Identity())
        with tlcore.capture(model, output_dir=str(tmp_path), log_token_ids=False) as captured:
            model(x)
        urls.append(captured.url)
    ((found,), _) = maps(tlcore.compare(*urls))
    assert found["columns"] == 256 and found["end"] == 10_000
    column = 6_000 * 256 // 10_000
    assert found["starts"][column] <= 6_000 < found["starts"][column + 1]
    assert all(np.flatnonzero(line).tolist() == [column] for line in field(found))


def test_what_has_the_last_token_alone_stands_at_it(tmp_path: Path) -> None:
    urls = []
    for scale in (1.0, 1.5):
        model = llama()
        model.lm_head.weight.data *= scale
        with tlcore.capture(model, output_dir=str(tmp_path)) as captured:
            model(**padded([[5, 6, 7, 8, 9]]), logits_to_keep=1)
        urls.append(captured.url)
    ((found,), _) = maps(tlcore.compare(*urls))
    line = field(found)[found["rows"].index("lm_head outputs")]
    assert found["columns"] == 5 and (line[:4] == UNKNOWN).all() and line[4] not in (UNKNOWN, EQUAL)


def test_runs_without_rows_have_rows_of_tensors(tmp_path: Path) -> None:
    urls = []
    for scale in (1.0, 1.01):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.get_submodule("1").get_parameter("bias").data *= scale
        with tlcore.capture(model, output_dir=str(tmp_path), log_token_ids=False) as captured:
            model(torch.randn(3, 4))
        urls.append(captured.url)
    ((found,), _) = maps(tlcore.compare(*urls))
    assert found["unit"] == "row" and found["columns"] == 3
    assert (field(found) != UNKNOWN).all() and (field(found)[-1] != EQUAL).all()
    assert map_section(tlcore.compare(*urls)).count("<canvas") == 1


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
