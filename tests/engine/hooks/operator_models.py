"""Models that tests of operators capture, and what these give."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tlcore
from tests.sinks import MemorySink

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))


class Gate(nn.Module):
    """Uses operators of every kind: functions, methods, properties, indexing, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor, shift: float = 0.5) -> torch.Tensor:
        h = functional.silu(self.up(x)) * self.scale
        first, second = h.chunk(2, -1)
        h = torch.cat([second, first], dim=-1)
        h += shift
        h[0] = 1.0
        return _turned(h)


def _turned(h: torch.Tensor) -> torch.Tensor:
    return h.T.mT


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate = Gate()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.gate(x)).tanh()


def captured(model: nn.Module, *ops: str, steps: int = 1, given: Any = X, **keys: Any) -> MemorySink:
    sink = MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, ops=list(ops), log_step_ids=[], **keys) as capture:
        for _ in range(steps):
            model(given)
    assert capture.ledger.balanced and not capture.ledger.failed
    return sink


def given_by(sink: MemorySink) -> dict[str, torch.Tensor]:
    """What operators gave, by name without the device."""
    return {name.removesuffix("_cpu"): value for name, value in sink.tensors.items() if "/op." in name}


def operator(sink: MemorySink, name: str, step: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = sink.steps[step].structures[f"{name}.json"]["operator"]
    return found


def expected(model: Model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        up = functional.linear(X, model.gate.up.weight, model.gate.up.bias)
        silu = functional.silu(up)
        mul = silu * model.gate.scale
        a, b = mul[:, :2], mul[:, 2:]
        cat = torch.cat([b, a], 1)
        plus = cat + 0.5
        put = plus.clone()
        put[0] = 1.0
    return {
        "gate.up/op.0000.linear": up,
        "gate/op.0000.silu": silu,
        "gate/op.0001.mul": mul,
        "gate/op.0002.chunk_0": a,
        "gate/op.0002.chunk_1": b,
        "gate/op.0003.cat": cat,
        "gate/op.0004.add_": plus,
        "gate/op.0005.setitem": put,
        "gate/op.0006.T": put.T,
        "gate/op.0007.mT": put,
    }


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> Any:
        return self.gate(self.gate(x, 0.25), 0.75)


class Raw(nn.Module):
    """Memory that nobody has written holds anything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(6, 4)
        out[:3] = x
        view = out[3:]
        view.copy_(x * 2)
        other = x.new_empty(3, 4)
        torch.add(x, 1, out=other)
        whole = torch.empty_like(x)
        whole[:] = other
        return out + 0 * whole.sum()
