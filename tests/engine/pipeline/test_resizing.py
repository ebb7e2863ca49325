"""Steps that differ from others in how many rows tensors have are described from those, and mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.engine.pipeline.content import content
from tlcore.engine.pipeline import describing, planner, resizing

# Where a segment ends depends on time, and with that places in files.
SEGMENTS: dict[str, Any] = {"name": "safetensors", "commit_s": 600}
BACKENDS: list[Any] = ["pt", {"name": "safetensors", "layout": 1}, SEGMENTS]


class Odd(nn.Module):
    """Tensors with and without rows, in containers, beside numbers that change or do not."""

    def forward(
        self, x: torch.Tensor, scale: float = 1.0, more: dict[str, torch.Tensor] | None = None
    ) -> Any:
        return {"sum": x.sum(), "x": [x * scale, (x.T, x[:, 0])], "none": None, "more": more}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.again = nn.Linear(4, 4), Odd(), Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.odd(self.first(x), scale=2.0, more={"a.b/c": x})
        self.again(x, float(len(x)))
        total: torch.Tensor = found["sum"]
        return total


def run(directory: Path, rows: list[int], **keys: Any) -> tlcore.Run:
    torch.manual_seed(0)
    model = Model()
    options: dict[str, Any] = {"output_dir": directory, "log_step_ids": [], **keys}
    with torch.no_grad(), tlcore.capture(model, **options) as captured:
        for number, count in enumerate(rows):
            model(torch.randn(count, 4, generator=torch.Generator().manual_seed(number)))
    assert captured.ledger.balanced
    return tlcore.open_run(captured.url)


@pytest.mark.parametrize("backend", BACKENDS, ids=["pt", "shards", "segments"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"max_tensor_size": 20}, {"store_dtype": "int8"}, {"capture": "stats"}, {"capture": "channels"}],
    ids=["all", "small ones", "int8", "statistics", "channels"],
)
def test_they_are_as_if_each_had_been_described_by_itself(
    keys: dict[str, Any], backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [3, 1, 2, 0, 7, 3, 1, 8, 2, 2, 2, 5, 3]
    with monkeypatch.context() as patch:
        patch.setattr(planner, "differ_in_rows", lambda *_: False)
        plain = run(tmp_path / "plain", rows, backend=backend, **keys)
    found = run(tmp_path / "resized", rows, backend=backend, **keys)
    found.verify()
    assert content(found) == content(plain)


def test_what_is_only_larger_is_not_described_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[str] = []
    plain = describing.describe_side

    def counting(side: Any, *rest: Any) -> Any:
        described.append(side.file)
        return plain(side, *rest)

    for module in (planner, resizing):
        monkeypatch.setattr(module, "describe_side", counting)
    run(tmp_path, [3, 1, 2, 7, 8], backend=SEGMENTS)
    again = [name for name in described if described.count(name) > 1]
    # One is given the number of rows, two have it in another dimension.
    assert set(again) == {"again/inputs.json", "again/outputs.json", "odd/outputs.json"}


def test_plans_are_forgotten_when_their_tensors_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_MOST_TENSORS", 20)
    monkeypatch.setattr(planner, "_LEAST_REMEMBERED", 1)
    kept: list[int] = []
    make = planner.Planner.plan

    def plan(self: planner.Planner, *batch: Any) -> planner.Plan:
        made = make(self, *batch)
        kept.append(len(self._known))
        return made

    monkeypatch.setattr(planner.Planner, "plan", plan)
    found = run(tmp_path, [1, 2, 3, 1, 2, 3], backend=SEGMENTS)
    found.verify()
    assert max(kept) == 1 and found.steps == list(range(6))
