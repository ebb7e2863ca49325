"""Small models, and how tests capture them into memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.engine.capture import capture

# All modules but the model itself, whose name is empty.
SUBMODULES = "."


class Shared(nn.Module):
    """Calls one linear three times and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.once = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.once(self.twice(self.twice(self.twice(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def run(module: nn.Module, steps: int = 1, size: int = 4, **keys: Any) -> tuple[MemorySink, capture]:
    sink = keys.pop("backend", None) or MemorySink()
    with tlcore.capture(module, backend=sink, **{"module_call_match": SUBMODULES, **keys}) as captured:
        for _ in range(steps):
            module(torch.randn(2, size))
    assert captured.ledger.balanced
    return sink, captured


def hook_count(module: nn.Module) -> int:
    """What listens in on the modules: their hooks, and what stands in for their ``forward``."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in module.modules()
    )


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error
