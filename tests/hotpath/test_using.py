"""Uses of operators that come again: each half takes the same, whatever is not as it was."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tlcore
from tests.hotpath.halves import native
from tests.sinks import MemorySink
from tlcore.engine.hooks.operands import Operands, as_plain
from tlcore.engine.hooks.operators import Operators, _Mode

X = torch.arange(12.0).reshape(3, 4)


class Changing(nn.Module):
    """What its code does with torch's functions differs from step to step in one way each."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.inner = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = self.step = self.step + 1
        y = self.inner(x)
        y = y * (2.0 if step % 2 else 2)
        y = y[..., : 3 if step % 3 else 4]
        y = torch.cat([y, y if step % 5 else x], -1)
        y = functional.softmax(y, dim=-1, dtype=torch.float32 if step % 4 else torch.float64).float()
        y = _plain_function(y, step % 7 == 0)
        z = torch.where(y > 0, y, y.new_zeros(())) if step % 6 else y.clone()
        z += self.bias[0] if step % 2 else x[0, 0]
        return (z - -0.0 if step % 2 else z - 0.0).sum()


def _plain_function(y: torch.Tensor, other: bool) -> torch.Tensor:
    return torch.relu(y) if other else torch.tanh(y)


def _captured(steps: int = 24) -> tuple[MemorySink, list[Any]]:
    torch.manual_seed(0)
    model, sink = Changing(), MemorySink()
    with (
        torch.no_grad(),
        tlcore.capture(model, backend=sink, inline=True, ops=["^"], log_step_ids=[]) as capture,
    ):
        for _ in range(steps):
            model(X)
    assert capture.ledger.balanced and not capture.ledger.failed
    shown = [
        (step.step, sorted((name, step.structures[name]) for name in step.structures)) for step in sink.steps
    ]
    return sink, shown


def test_both_halves_store_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    native()
    sink, shown = _captured()
    monkeypatch.setattr(Operators, "_native_half", lambda self: (self._takes_again, self.operands.knows_all))
    other, shown_by_other = _captured()
    assert shown == shown_by_other
    assert list(sink.tensors) == list(other.tensors)
    assert all(one.equal(two) for one, two in zip(sink.tensors.values(), other.tensors.values(), strict=True))


def test_what_comes_again_never_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    native()
    taken: list[Any] = []
    take = Operators.take

    def counted(self: Operators, func: Any, *given: Any) -> None:
        taken.append(func)
        take(self, func, *given)

    class Steady(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = torch.cat((x * 0.5, -x[..., :2]), -1).to(torch.float64)
            return functional.softmax(y, dim=-1, dtype=torch.float32).transpose(0, 1)

    monkeypatch.setattr(Operators, "take", counted)
    model = Steady()
    with (
        torch.no_grad(),
        tlcore.capture(model, backend=MemorySink(), inline=True, ops=["^"], log_step_ids=[]),
    ):
        model(X)
        first = len(taken)
        assert first
        model(X)
        model(X)
    assert len(taken) == first


@pytest.mark.parametrize(
    "value", [1, -2.5, None, "a", ..., torch.float16, (1, None), (..., slice(None, 2)), slice(1)]
)
def test_plain_values_stand_for_themselves(value: Any) -> None:
    assert as_plain(value) is value


@pytest.mark.parametrize(
    "value", [0.0, -0.0, float("nan"), [1], {}, X, (X,), slice(X[0, 0], None), (1, (0.0,)), 1j]
)
def test_others_are_asked_for_each_time(value: Any) -> None:
    assert as_plain(value) is Operands.ASK


def test_it_keeps_nothing_and_tells_what_it_cannot_take() -> None:
    module = native()
    walker = module.Walker(lambda _: None, lambda *_: None)
    operands = Operands()
    using = module.Using(
        walker, operands, None, operands.known, operands.raw, {}, operands.of, operands.ASK, lambda *_: None
    )
    frame = sys._getframe()
    with pytest.raises(AttributeError, match="running"):
        using.again(torch.add, (), {}, X, frame)
    with pytest.raises(TypeError):
        using.again(torch.add)
    assert using.again(torch.add, (), {}, X, None) is False
    operands.note_one(X, ("from", "x"))
    assert using.knows((X, 1, None, (X, "a"), 0.5, True)) and using.knows({"a": X, "b": (X,)})
    other = X.clone()
    assert not using.knows(other) and not using.knows(((other,),)) and not using.knows({"a": [X]})
    assert all(
        using.knows(each) == operands.knows_all(each) for each in ((X, [X]), X, other, {"a": (X, other)})
    )
    empty: Any = module.Using.__new__(module.Using)
    with pytest.raises(RuntimeError, match="make it anew"):
        empty.knows(X)
    with pytest.raises(RuntimeError, match="make it anew"):
        empty.again(torch.add, (), {}, X, frame)
    before = sys.getrefcount(operands)
    del using, empty
    gc.collect()
    assert sys.getrefcount(operands) < before


def test_the_mode_is_traced_by_a_compiler_without_a_break() -> None:
    told: list[Any] = []

    def again(func: Any, *given: Any) -> bool:
        told.append(func)
        return True

    def computes(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x).cos()

    operators: Any = SimpleNamespace(before=lambda *given: None)
    mode: Any = _Mode(operators, again)
    compiled: Any = torch.compile(computes, backend="eager", fullgraph=True)
    with mode:
        found = compiled(X)
        # Old releases call functions of torch while they compile.
        told.clear()
        assert compiled(X).equal(found)
    # What runs is heard.
    assert len(told) == 2
    assert found.equal(X.sin().cos())
