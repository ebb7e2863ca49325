"""A call's module where nothing else says it than the call's directory, and calls found by modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.reader import MissingError


class _Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_1, self.twice = nn.ReLU(), nn.Tanh(), nn.Sigmoid()
        self.add("a/b", nn.Identity())
        self.add("y" * 300, nn.Identity())

    def add(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (*self.children(), self.twice):
            x = module(x)
        return x


@pytest.mark.parametrize("keys", [{"capture": "stats"}, {"capture": "channels"}, {"max_tensor_size": 0}, {}])
@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_call_of_which_nothing_is_stored_says_its_module(
    tmp_path: Path, keys: dict[str, Any], backend: str
) -> None:
    model = _Numbered()
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, **keys) as captured:
        model(torch.ones(2, 2))
    step = tlcore.open_run(captured.url).step(0)
    calls = [(call.module, call.index) for call in map(step.call, step.calls)]
    assert calls == [*((name, 0) for name, _ in model.named_modules()), ("twice", 1)]


def test_a_first_call_is_found_by_the_module_whatever_its_name(tmp_path: Path) -> None:
    model = _Numbered()
    with tlcore.capture(model, output_dir=tmp_path) as captured:
        model(torch.ones(2, 2))
    step = tlcore.open_run(captured.url).step(0)
    for name, _ in model.named_modules():
        assert step.call(name).module == name and step.call(name).index == 0
    with pytest.raises(MissingError, match="no call 'a/c'"):
        step.call("a/c")
