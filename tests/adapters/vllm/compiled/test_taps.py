"""Taps in small compiled models, without vLLM: what they show, what is missing, and CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tlcore
from tests.sinks import MemorySink
from tlcore.adapters.vllm.compiled.dry_run import DryRun, Plan
from tlcore.adapters.vllm.compiled.graph_copies import StaticCopies
from tlcore.adapters.vllm.compiled.tapped import install_taps
from tlcore.adapters.vllm.compiled.taps import Taps
from tlcore.config.configuration import load_config
from tlcore.engine.filters.modules import ModuleFilter
from tlcore.engine.hooks import tap_op
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session

pytestmark = pytest.mark.slow


class Rotates(nn.Module):
    """Changes its second argument in place, and returns a tuple and a dictionary."""

    def forward(self, x: torch.Tensor, *, state: torch.Tensor) -> Any:
        state.mul_(2)
        return (x.roll(1, 0), None), {"sum": x + state}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rotates = Rotates()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            state = torch.ones_like(x)
            (x, _), more = self.rotates(self.first(x), state=state)
            x = self.norm(x + more["sum"])
        return x.relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(x)
        return output


@pytest.fixture(autouse=True)
def _nobody_receives_afterwards() -> Iterator[None]:
    yield
    tap_op.receive_with(None)


def _model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def _step(session: Session, model: Model, x: torch.Tensor) -> torch.Tensor:
    session.begin_step()
    with torch.no_grad():
        result = model.logits(model(x))
    session.end_step()
    return result


def _session(sink: MemorySink, **keys: Any) -> Session:
    config = load_config({"log_step_ids": [], "output_dir": "memory://unused", **keys})
    return Session(config, new_run(config), sink, inline=True)


def _tapped(model: Model, session: Session, device: str = "cpu") -> Taps:
    config = session.config
    rehearsal = DryRun(model, ModuleFilter(config.module_call_match), config.log_post_fwd_inputs)

    def forward_pass() -> None:
        with torch.no_grad():
            model.logits(model(torch.ones(7, 4, device=device)))

    plan = rehearsal.run(forward_pass)
    anchor = torch.zeros(1, device=device)
    for module, slots in plan.slots.items():
        install_taps(module, slots, anchor, plan.code[module])
    taps = Taps(plan, torch.device(device))
    session.attach(model, taps)
    return taps


def _hooked(x: torch.Tensor, **keys: Any) -> MemorySink:
    """What hooks capture of the plain model."""
    model, sink = _model(), MemorySink()
    session = _session(sink, **keys)
    session.attach(model)
    _step(session, model, x)
    session.close()
    return sink


def _no_backend(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    return graph


@pytest.mark.parametrize("backend", [None, _no_backend, "aot_eager"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"log_post_fwd_inputs": True},
        {"module_call_match": ["rotates:1", "head"]},
        {"max_tensor_size": 12},
    ],
)
def test_taps_show_what_hooks_would(backend: Any, keys: dict[str, Any]) -> None:
    x = torch.randn(3, 4)
    expected = _hooked(x, **keys)
    model, sink = _model(), MemorySink()
    session = _session(sink, **keys)
    _tapped(model, session)
    if backend is not None:
        model.inner.forward = torch.compile(model.inner.forward, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    for size in (3, 5):
        _step(session, model, x if size == 3 else torch.randn(size, 4))
    session.close()
    first, second = sink.steps
    assert first.calls == second.calls == expected.steps[0].calls
    assert dict(first.structures) == dict(expected.steps[0].structures)
    assert first.counts == expected.steps[0].counts
    assert second.counts.captured == first.counts.captured and second.counts.failed == 0
    shown = {name for name in sink.tensors if name.startswith("step_0/")}
    assert shown == set(expected.tensors)
    for name in shown:
        torch.testing.assert_close(sink.tensors[name], expected.tensors[name])


def test_inductor_neither_drops_nor_moves_taps() -> None:
    x = torch.randn(3, 4)
    expected = _hooked(x, log_post_fwd_inputs=True)
    model, sink = _model(), MemorySink()
    session = _session(sink, log_post_fwd_inputs=True)
    _tapped(model, session)
    model.inner.forward = torch.compile(model.inner.forward, fullgraph=True)  # type: ignore[method-assign]
    _step(session, model, x)
    session.close()
    assert set(sink.tensors) == set(expected.tensors)
    for name, tensor in sink.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_a_tap_that_does_not_fire_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = _model(), MemorySink()
    session = _session(sink)
    _tapped(model, session)
    # As a stale graph would: a module whose taps are gone.
    del model.inner.norm.forward
    with caplog.at_level(logging.ERROR, logger="vllm.tlcore"):
        _step(session, model, torch.randn(3, 4))
    session.close()
    (step,) = sink.steps
    assert step.counts.balanced
    assert step.counts.failed == 4
    assert step.counts.reasons == {"failed: its tap did not fire": 4}
    assert step.counts.stored == step.counts.captured - 4 > 10
    assert "did not run all of its taps" in step.extra["error"]
    assert "4 tensors of a selected step were not shown" in caplog.text
    assert step.calls.count("inner.norm") == 1


def test_patterns_that_no_module_has_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    session = _session(MemorySink(), module_call_match=["rotates", "inner.frist"])
    with caplog.at_level(logging.WARNING):
        _tapped(model, session)
    session.close()
    assert [each for each in caplog.messages if "'inner.frist'" in each and "inner.first" in each]
    assert not [each for each in caplog.messages if "'rotates'" in each or "nothing will be stored" in each]


def test_without_a_step_taps_do_nothing() -> None:
    model, sink = _model(), MemorySink()
    session = _session(sink, log_step_ids=[1])
    _tapped(model, session)
    plain = _model()
    for _ in range(3):
        x = torch.randn(3, 4)
        with torch.no_grad():
            assert torch.equal(_step(session, model, x), plain.logits(plain(x)))
    session.close()
    assert [step.step for step in sink.steps] == [1]


def test_a_slot_table_changes_with_what_is_tapped() -> None:
    def table(*patterns: str) -> list[str]:
        model = _model()
        rehearsal = DryRun(model, ModuleFilter(patterns), post_inputs=False)
        plan: Plan = rehearsal.run(lambda: model(torch.ones(2, 4)))
        return plan.table

    assert table("first") == ["inner.first/inputs/0", "inner.first/outputs/0"]
    assert table("first", "norm") != table("first")
    assert table("nothing") == []


class Shows(nn.Module):
    """Taps in every place: its own code, a method that another module calls, a function, nested values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = tlcore.tap("x", x * 3)
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = tlcore.tap("x", self.first(x))
        tlcore.tap("pair", (x + 1, {"a": [x + 2]}))
        x = tlcore.tap("x", _shifted(self.norm(x)))
        return x * 2


def _shifted(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = tlcore.tap("shifted", x + 5)
    return result


class Around(Inner):
    """Calls them, and shows something by the names that these use."""

    def __init__(self) -> None:
        super().__init__()
        self.shows = nn.ModuleList([Shows(), Shows()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tlcore.tap("x", x - 1)
        for each in (*self.shows, self.shows[0]):
            x = each.scaled(each(x))
        tlcore.tap("x", x - 2)
        x.add_(1)
        return x


def _around() -> Model:
    model = _model()
    model.inner = Around().eval()
    return model


def _shown(compiled: Any, x: torch.Tensor, **keys: Any) -> MemorySink:
    """What is captured of them by taps; ``compiled`` is a backend, None for code that is not compiled."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, sink = _around(), MemorySink()
    session = _session(sink, **keys)
    _tapped(model, session)
    if compiled is not None:
        model.inner.forward = torch.compile(model.inner.forward, fullgraph=True, backend=compiled)  # type: ignore[method-assign]
    for size in (len(x), 5):
        _step(session, model, x if size == len(x) else torch.ones(size, 4))
    session.close()
    assert session.remarks == []
    return sink


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize(
    "patterns", [None, [r"\.tap\."], [r"shows\.0\.tap\.x:2", r"norm"], [r"tap\.shifted"], [r"inner$"]]
)
def test_values_within_a_forward_are_captured_as_hooks_do(backend: Any, patterns: list[str] | None) -> None:
    keys = {} if patterns is None else {"module_call_match": patterns}
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    model, expected = _around(), MemorySink()
    session = _session(expected, **keys)
    session.attach(model)
    _step(session, model, x)
    session.close()
    sink = _shown(backend, x, **keys)
    first, second = sink.steps
    assert first.calls == second.calls == expected.steps[0].calls
    assert dict(first.structures) == dict(expected.steps[0].structures)
    assert first.counts == expected.steps[0].counts and first.counts.failed == 0
    assert (second.counts.stored, second.counts.failed) == (first.counts.stored, 0)
    shown = {name: tensor for name, tensor in sink.tensors.items() if name.startswith("step_0/")}
    assert set(shown) == set(expected.tensors)
    assert any("tap." in name for name in shown) == (patterns != [r"inner$"])
    for name, tensor in shown.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_inductor_neither_drops_nor_moves_values_within_a_forward() -> None:
    x = torch.randn(3, 4)
    expected, sink = _shown(None, x), _shown("inductor", x)
    assert set(sink.tensors) == set(expected.tensors)
    for name, tensor in sink.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_what_only_compiled_code_shows_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Branches(Rotates):
        def forward(self, x: torch.Tensor, *, state: torch.Tensor) -> Any:
            # The dry run has seven rows.
            if x.shape[0] != 7:
                tlcore.tap("other", x)
            return super().forward(x, state=state)

    model, sink = _model(), MemorySink()
    model.inner.rotates = Branches()
    session = _session(sink)
    _tapped(model, session)
    model.inner.forward = torch.compile(model.inner.forward, fullgraph=True, backend="eager")  # type: ignore[method-assign]
    _step(session, model, torch.randn(3, 4))
    session.close()
    assert sink.steps[0].counts.failed == 0
    assert "tlcore.tap('other') in or below a Branches did not come by" in caplog.text


def test_static_copies_follow_each_replay() -> None:
    """A traced function stands for the graph: replayed, it runs the recorded operations and no Python."""
    copies = StaticCopies(torch.device("cpu"))

    def forward(x: torch.Tensor) -> torch.Tensor:
        copies.begin_pass()
        copies.record(3, x * 2)
        copies.record(5, x + 1)
        copies.record(3, x * 4)
        return x

    # Unlike a CUDA graph, a trace repeats allocations too; the second one finds the buffers there.
    make_fx(forward)(torch.ones(4, 2))
    large = make_fx(forward)(torch.ones(4, 2))
    small = make_fx(forward)(torch.ones(2, 2))
    for graph, x in ((small, torch.full((2, 2), 3.0)), (large, torch.full((4, 2), 5.0))):
        copies.begin_step()
        graph(x)
        found = list(copies.replayed())
        assert [slot for slot, _ in found] == [3, 3, 5]
        for (_, copy), wanted in zip(found, (x * 2, x * 4, x + 1), strict=True):
            assert torch.equal(copy, wanted)
    copies.begin_step()
    assert list(copies.replayed()) == []
    # Twice in one step: the first copy is gone.
    large(torch.ones(4, 2))
    large(torch.ones(4, 2))
    assert list(copies.replayed()) == []


@pytest.mark.gpu
def test_taps_in_a_cuda_graph_show_what_each_replay_computes() -> None:
    model, sink = _model().cuda(), MemorySink()
    session = _session(sink)
    taps = _tapped(model, session, "cuda")
    tap_op.receive_with(taps)
    inputs = torch.zeros(3, 4, device="cuda")
    with torch.no_grad():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        taps.begin_pass()
        with torch.cuda.graph(graph):
            hidden = model(inputs)
    for _ in range(2):
        x = torch.randn(3, 4)
        # A replay outside a step is not captured, and does not confuse the next one.
        graph.replay()
        session.begin_step()
        inputs.copy_(x)
        graph.replay()
        with torch.no_grad():
            model.logits(hidden)
        session.end_step()
        expected = _hooked(x)
        session.flush()
        number = sink.steps[-1].step
        assert sink.steps[-1].counts.failed == 0
        for name, tensor in expected.tensors.items():
            wanted = name.replace("step_0/", f"step_{number}/").replace("_cpu", "_cuda_0")
            torch.testing.assert_close(sink.tensors[wanted], tensor, rtol=1e-4, atol=1e-5)
    session.close()
