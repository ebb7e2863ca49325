"""Calls that somebody only traces, and what is compiled and kept beside the model: no call, and told of."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.engine.hooks.compiled_versions import _Made
from tlcore.engine.hooks.tracing import TRACES

if not TRACES:
    pytest.skip("this torch is too old to tell who traces a call", allow_module_level=True)
X = torch.linspace(-1, 1, 8).reshape(2, 4)
CALLS = ["_root", "0", "1", "2", "2.0"]
Make = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def _forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Taps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tlcore.tap("x", x.relu())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Taps(), nn.Sequential(nn.Linear(4, 4)))


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def compiled_part(model: Any) -> Any:
    return compiled(model[2])


def compiled_function(model: Any) -> Any:
    return compiled(lambda x: model(x) + 1)


def compiled_forward(model: Any) -> Any:
    return compiled(model.forward)


def traced(model: Any) -> Any:
    return torch.jit.trace(model, X, check_trace=False)  # type: ignore[no-untyped-call]


def traced_part(model: Any) -> Any:
    return traced(model[2])


def exported(model: Any) -> Any:
    return torch.export.export(model, (X,)).module()


def exported_strictly(model: Any) -> Any:
    return torch.export.export(model, (X,), strict=True).module()


def proxied(model: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(X)


def symbolic(model: Any) -> Any:
    # Its own calls of the leaves are real ones.
    return torch.fx.symbolic_trace(model) and model


def faked(model: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call(x: torch.Tensor) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return model(mode.from_tensor(x))

    return call


COMPILED = "torch.compile compiled calls of {}; what ran compiled is not in the run"
WITHIN = "calls of {} within {} are not captured"
PART = "module '2'"
MADE: list[tuple[Make, str]] = [
    (compiled, COMPILED.format("the model")),
    (compiled_part, COMPILED.format(PART)),
    (compiled_function, COMPILED.format("the model")),
    (traced, WITHIN.format("the model", "torch.jit.trace")),
    (traced_part, WITHIN.format(PART, "torch.jit.trace")),
    (exported, WITHIN.format("the model", "torch.export")),
    (exported_strictly, WITHIN.format("the model", "torch.export")),
    (proxied, WITHIN.format("the model", "tracing with fake tensors or proxies")),
    (faked, WITHIN.format("the model", "tracing with fake tensors or proxies")),
]


def run(
    make: Make, ahead: bool, bracket: bool, **keys: Any
) -> tuple[MemorySink, tlcore.capture, list[Any], Any]:
    model, sink = net(), MemorySink()
    made = make(model) if ahead else None
    if made is not None:
        made(X)
    results = []
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[], **keys) as capture:
        for _ in range(2):
            if bracket:
                with capture.step():
                    model(X)
                    results.append((made or make(model))(X))
            else:
                model(X)
                results.append((made or make(model))(X))
    assert capture.ledger.balanced and capture.ledger.captured == capture.ledger.stored
    assert not any("forward" in vars(each) or "_compiled_call_impl" in vars(each) for each in model.modules())
    return sink, capture, results, make(net())(X)


@pytest.mark.parametrize(("make", "said"), MADE)
def test_what_is_traced_within_a_step_is_no_call_and_said(make: Make, said: str) -> None:
    sink, capture, results, expected = run(make, ahead=False, bracket=True)
    assert [step.calls for step in sink.steps] == [CALLS] * 2
    assert len([name for name in sink.tensors if "tap.x" in name]) == 2
    assert [text for text in capture.remarks if said in text] == capture.remarks != []
    if make is not faked:
        assert all(torch.equal(each, expected) for each in results)


FORWARD = COMPILED.format("module '0', module '1', module '2'")


@pytest.mark.parametrize(("make", "said"), [*MADE[:3], (compiled_forward, FORWARD)])
def test_what_was_compiled_before_is_said_when_a_step_calls_it(make: Make, said: str) -> None:
    sink, capture, _, _ = run(make, ahead=True, bracket=True)
    assert [step.calls for step in sink.steps] == [CALLS] * 2
    assert len(capture.remarks) == 1 and said in capture.remarks[0]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("make", "said"), MADE[:2])
def test_a_compiled_version_beside_steps_is_said_when_it_is_called(
    make: Make, said: str, ahead: bool
) -> None:
    sink, capture, results, expected = run(make, ahead, bracket=False)
    assert [step.calls for step in sink.steps] == [CALLS] * 2
    assert len(capture.remarks) == 1 and said in capture.remarks[0]
    assert all(torch.equal(each, expected) for each in results)


def test_a_compiled_version_of_what_holds_the_model_is_said() -> None:
    model = net()
    outer = compiled(nn.Sequential(model))
    with tlcore.capture(model, backend=MemorySink(), log_step_ids=[]) as capture:
        model(X)
        outer(X)
    assert len(capture.remarks) == 1 and COMPILED.format("the model") in capture.remarks[0]


@pytest.mark.parametrize("bracket", [False, True])
def test_what_runs_eagerly_after_all_is_captured_and_not_said(bracket: bool) -> None:
    model, sink = net(), MemorySink()
    disabled, kept = torch.compiler.disable(model), compiled(model)  # type: ignore[no-untyped-call]
    capture = tlcore.capture(model, backend=sink, inline=True, log_step_ids=[])
    with capture, capture.step() if bracket else contextlib.nullcontext():
        disabled(X)
        with torch.compiler.set_stance("force_eager"):
            kept(X)
    assert sum(len(step.calls) for step in sink.steps) == 2 * len(CALLS)
    assert capture.remarks == []


def test_one_that_is_not_called_is_not_said() -> None:
    model = net()
    kept = [compiled(model)]
    with tlcore.capture(model, backend=MemorySink(), log_step_ids=[]) as capture:
        model(X)
        kept.append(compiled(model[2]))
        compiled(net())(X)
    assert capture.remarks == []
    assert not any("_compiled_call_impl" in vars(each) for each in kept)


def test_a_symbolic_trace_within_a_step_adds_nothing() -> None:
    sink, capture, _, _ = run(symbolic, ahead=False, bracket=True)
    again = [f"{name}_1" for name in CALLS]
    assert [step.calls for step in sink.steps] == [[*CALLS, *again]] * 2
    assert capture.remarks == [WITHIN.format("module '1', module '2'", "torch.fx.symbolic_trace")]


def test_a_compiled_call_beside_eager_ones_is_captured_with_taps() -> None:
    sink, capture, _, _ = run(compiled, ahead=False, bracket=True, compiled="taps")
    again = [f"{name}_1" for name in CALLS]
    assert [step.calls for step in sink.steps] == [[*CALLS, *again]] * 2
    assert capture.remarks == []


def test_a_condition_within_a_model_compiles_its_branches_and_is_said() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.cond(x.sum() > 0, self.a, self.b, (x,))

    model = Branches()
    expected = model(X)
    with tlcore.capture(model, backend=MemorySink()) as capture:
        assert torch.equal(model(X), expected)
    assert COMPILED.format("module 'a', module 'b'") in capture.remarks[0]


def test_objects_are_looked_through_only_when_something_new_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    look = gc.get_objects

    def counted() -> list[object]:
        looks.append(1)
        return look()

    model = nn.Linear(2, 2)
    kept = [torch.compile(model, backend="eager")]
    made = _Made()
    monkeypatch.setattr(gc, "get_objects", counted)
    assert kept[0] in made() and len(looks) == 1
    number = len(made())
    assert len(made()) == number and len(looks) == 1
    kept.append(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert set(kept) <= set(made()) and len(looks) == 2
    kept.pop()
    gc.collect()
    assert len(made()) == number
    # One goes and another comes: as many hold the class as before, but not all of them are known.
    kept[0] = torch.compile(nn.Linear(2, 2), backend="eager")
    gc.collect()
    assert kept[0] in made()
