"""Models that are compiled within a capture with ``"compiled": "taps"``: captured as if hooks had run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.engine.hooks.tracing import TRACES

pytestmark = pytest.mark.slow

if not TRACES:
    pytest.skip("this torch is too old for taps of compiled models", allow_module_level=True)
How = Callable[[Any, str], Any]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, scale: int = 1, mask: Any = None) -> Any:
        probs = tlcore.tap("probs", (self.q(x) @ self.k(x).T * scale).softmax(-1))
        return probs @ x, None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, name: str = "x") -> Any:
        return {"hidden": x + self.attention(self.norm(x), scale=2)[0]}


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, "y")["hidden"]
        return self.out(self.out(x)).relu()  # type: ignore[no-any-return]


X = [torch.randn(3, 4), torch.randn(5, 4)]


@pytest.fixture(autouse=True)
def _forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(layers: int = 2) -> Model:
    torch.manual_seed(0)
    return Model(layers)


def whole(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def forward(model: Any, backend: str) -> Any:
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model


def method(model: Any, backend: str) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def regional(model: Any, backend: str) -> Any:
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return model


def regional_forwards(model: Any, backend: str) -> Any:
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    return model


def eager(model: Any, backend: str) -> Any:
    return model


def run(model: Model, how: How, backend: str = "eager", **keys: Any) -> tuple[MemorySink, Any, list[Any]]:
    sink = MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[], **keys) as capture:
        called = how(model, backend)
        results = [called(x) for x in X]
    assert capture.ledger.balanced and not capture.ledger.failed
    return sink, capture, results


def assert_same(sink: MemorySink, expected: MemorySink) -> None:
    assert [step.calls for step in sink.steps] == [step.calls for step in expected.steps]
    assert list(sink.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(sink.tensors[name], tensor)


@pytest.mark.parametrize("how", [whole, forward, method, regional, regional_forwards, eager])
def test_each_way_to_compile_is_captured_as_if_hooks_had_run(how: How) -> None:
    post = how is regional
    expected, _, plain = run(made(), eager, log_post_fwd_inputs=post)
    sink, capture, results = run(made(), how, compiled="taps", log_post_fwd_inputs=post)
    assert_same(sink, expected)
    for step, wanted in zip(sink.steps, expected.steps, strict=True):
        assert dict(step.structures) == dict(wanted.structures)
    assert capture.remarks == []
    assert all(map(torch.equal, results, plain))


def test_only_what_is_selected_and_a_second_capture() -> None:
    patterns = [r"layers\.1\.attention$", r"layers\.0.*probs", "out:1"]
    expected, _, _ = run(made(), eager, module_call_match=patterns)
    model = made()
    for _ in range(2):
        sink, _, _ = run(model, whole, compiled="taps", module_call_match=patterns)
        assert_same(sink, expected)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_and_training(backend: str) -> None:
    expected, _, _ = run(made(), eager)
    sink, _, results = run(made(), whole, backend, compiled="taps")
    assert_same(sink, expected)
    plain, model = whole(made(), backend), made()
    # Inductor fuses other kernels where values are shown in between, and these round otherwise.
    near = torch.allclose if backend == "inductor" else torch.equal
    assert near(plain(X[0]), results[0])
    plain(X[0]).sum().backward()
    with tlcore.capture(model, backend=MemorySink(), compiled="taps") as capture, capture.step():
        whole(model, backend)(X[0]).sum().backward()
    assert capture.ledger.captured == sum(name.startswith("step_0/") for name in expected.tensors)
    for (name, gradient), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert gradient.grad is not None and wanted.grad is not None
        assert near(gradient.grad, wanted.grad), name


def test_layers_that_are_alike_are_all_compiled() -> None:
    """More of them than a function may be compiled anew."""
    expected, _, _ = run(made(12), eager)
    sink, _, _ = run(made(12), regional, compiled="taps")
    assert_same(sink, expected)


def test_steps_that_are_not_selected_compile_nothing_anew() -> None:
    model, sink = made(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[1, 3], compiled="taps"):
        compiled = whole(model, "eager")
        compiled(X[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(4):
                compiled(X[0])
            copy.deepcopy(model)(X[0])
    assert [step.step for step in sink.steps] == [1, 3]
    assert sink.steps[0].counts.captured == sink.steps[1].counts.captured > 20


def test_code_that_breaks_the_graph_is_captured_in_its_parts() -> None:
    class Breaks(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)["hidden"]
            torch._dynamo.graph_break()
            return self.out(self.layers[1](x)["hidden"])  # type: ignore[no-any-return]

    def broken() -> Model:
        torch.manual_seed(0)
        return Breaks()

    expected, _, _ = run(broken(), eager)
    sink, _, _ = run(broken(), lambda model, backend: torch.compile(model, backend=backend), compiled="taps")
    assert_same(sink, expected)


def test_one_that_raises_ends_its_step_before_the_next() -> None:
    class Raises(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.out(x)
            torch._assert_async(torch.isfinite(x).all())
            return self.out(x)  # type: ignore[no-any-return]

    model, sink = Raises(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[], compiled="taps"):
        compiled = whole(model, "eager")
        with pytest.raises(RuntimeError):
            compiled(X[0] * torch.nan)
        compiled(X[0])
    assert [step.calls for step in sink.steps] == [["_root", "out"], ["_root", "out", "out_1"]]
    assert sink.steps[0].extra["error"] == "builtins.RuntimeError"


def test_what_is_not_looked_into_is_counted() -> None:
    class Box:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class Inner(nn.Module):
        def forward(self, box: Any, number: int, share: float) -> Any:
            return box.x * number * share

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(Box(x), x.shape[0], 0.5)

    model, sink = Outer(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[], compiled="taps") as capture:
        compiled = whole(model, "eager")
        for x in (*X, torch.randn(6, 4)):
            compiled(x)
    assert capture.ledger.balanced and capture.ledger.skipped == 3
    items = sink.steps[2].structures["inner/inputs.json"]["items"]
    assert "do not reach" in items[0]["skipped"] and items[1] == {"type": "int", "value": 6}


def test_an_outermost_call_is_a_step() -> None:
    model, sink = made(), MemorySink()
    with tlcore.capture(
        model, backend=sink, inline=True, log_step_ids=[], compiled="taps", step="outermost"
    ) as capture:
        torch.compile(model.layers[0], backend="eager")(X[0])
        torch.compile(model, backend="eager")(X[0])
    assert [step.calls[0] for step in sink.steps] == ["layers.0", "_root"]
    assert capture.remarks == []


@pytest.mark.parametrize("how", [whole, forward, method, regional])
def test_what_is_compiled_before_is_refused(how: How) -> None:
    model = how(made(), "eager")
    with pytest.raises(tlcore.CaptureError, match="compile it inside the capture"):
        run(model, eager, compiled="taps")


def test_gradients_are_not_promised() -> None:
    with pytest.raises(tlcore.ConfigError, match="no gradients"):
        tlcore.capture(made(), compiled="taps", log_gradients=True)


def test_an_exported_program_has_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    with tlcore.capture(model, backend=MemorySink(), compiled="taps"):
        program = torch.export.export(model, (X[0],))
    assert not any("tlcore" in str(node.target) for node in program.graph.nodes)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(program.module()(X[0]), model(X[0]))


@pytest.mark.gpu
def test_cuda_graphs_do_not_hide_calls() -> None:
    model, sink = made().cuda(), MemorySink()
    plain = torch.compile(made().cuda(), mode="reduce-overhead")
    with tlcore.capture(model, backend=sink, log_step_ids=[], compiled="taps") as capture, torch.no_grad():
        compiled = torch.compile(model, mode="reduce-overhead")
        for _ in range(4):
            torch.testing.assert_close(compiled(X[0].cuda()), plain(X[0].cuda()))
    assert capture.ledger.balanced and not capture.ledger.failed
    expected, _, _ = run(made(), eager)
    assert len(sink.steps) == 4 and {step.counts.captured for step in sink.steps} == {
        sum(name.startswith("step_0/") for name in expected.tensors)
    }


def test_a_compiled_result_that_forward_hooks_change_is_skipped_and_not_stored_as_it_was_before() -> None:
    model, sink = made(), MemorySink()
    first = model.layers[0]

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return {"hidden": output["hidden"] + 1}

    handle = first.register_forward_hook(add)
    with torch.no_grad(), tlcore.capture(model, backend=sink, compiled="taps", log_step_ids=[]) as capture:
        for layer in model.layers:
            layer.compile(backend="eager")
        model(X[0])
        handle.remove()
        model(X[0])
        first.register_forward_hook(add)
        model(X[0])
    plain = sink.tensors["step_1/layers.0/outputs_hidden_cpu"]
    assert torch.equal(sink.tensors["step_1/layers.1/inputs_0_cpu"], plain)
    for step in (0, 2):
        assert torch.equal(sink.tensors[f"step_{step}/layers.1/inputs_0_cpu"], plain + 1)
        assert f"step_{step}/layers.0/outputs_hidden_cpu" not in sink.tensors
        assert "forward hooks" in str(sink.steps[step].structures["layers.0/outputs.json"])
    assert capture.ledger.skipped == 2
