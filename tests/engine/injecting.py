"""Models and captures for the tests of ``inject``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore
from tests.toys import hook_count

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


class Two(nn.Module):
    """Two layers and a module of a structured result; ``faults`` are those that go wrong."""

    def __init__(self, *faults: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = Layer("first" in faults), Layer("second" in faults), Layer()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        pair, kept = self.first(x * scale)["pair"]
        return self.last(self.second(pair + kept)["pair"][0])["pair"]


class Layer(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.by = 1.5 if wrong else 1.0

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x) * self.by
        return {"pair": (y, x), "size": 6, "none": None}


def run(tmp_path: Path, model: nn.Module, *given: Any, **keys: Any) -> Any:
    """The run of a capture, its result and remarks."""
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[], **keys) as capture:
        results = [model(*(each if isinstance(each, tuple) else (each,))) for each in given or (X,)]
    assert capture.ledger.balanced and not capture.ledger.failed and hook_count(model) == 0
    return tlcore.open_run(capture.url), results, capture.remarks


def inject(other: Any, *modules: str) -> dict[str, Any]:
    return {"run": other.url, "modules": list(modules)}
