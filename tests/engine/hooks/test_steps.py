"""What a step is: a call of the model, the outermost call of any module, of a method, or a bracket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink
from tlcore.errors import ConfigError

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(4, 2)), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encoder(x))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.decoder(x)
        return out

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return (self.decode(self.encoder(x)) - x).square().mean()

    def each(self, x: torch.Tensor) -> Any:
        yield self.encoder(x)


def captured(step: str = "root", **keys: Any) -> tuple[Autoencoder, MemorySink, tlcore.capture]:
    module, sink = Autoencoder(), MemorySink()
    keys = {"log_step_ids": [], "module_call_match": "coder", **keys}
    return module, sink, tlcore.capture(module, backend=sink, step=step, **keys)


ALL = ["encoder", "encoder.0", "decoder"]


def test_a_bracket_makes_one_step_of_any_code() -> None:
    module, sink, capture = captured()
    with capture:
        with capture.step():
            h = module.encoder(X)
            with capture.step():
                module.decode(h)
            module(X)
        module(X)
        with pytest.raises(RuntimeError), capture.step():
            module.encoder(X[:, :3])
    again = ["encoder_1", "encoder.0_1", "decoder_1"]
    assert [step.calls for step in sink.steps] == [ALL + again, ALL, ALL[:2]]
    assert "RuntimeError" in sink.steps[2].extra["error"]
    assert capture.remarks == []


def test_the_outermost_calls_are_steps() -> None:
    module, sink, capture = captured("outermost")
    with capture:
        module(X)
        module.training_step(X)
        with capture.step():
            module.training_step(X)
        module.encoder = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        module(X)
        module.encoder(X)
    new = ["encoder", "encoder.0", "encoder.1"]
    assert [s.calls for s in sink.steps] == [ALL, ALL[:2], ALL[2:], ALL, [*new, "decoder"], new]
    assert not any("_compiled_call_impl" in vars(each) for each in module.modules())


def test_a_call_of_a_method_is_a_step() -> None:
    module, sink, capture = captured("method:training_step")
    with capture:
        loss = module.training_step(X)
        module(X)
        module.encoder(X)
    assert loss.shape == () and [step.calls for step in sink.steps] == [ALL]
    assert "training_step" not in vars(module)
    (said,) = capture.remarks
    assert said.startswith("2 calls outside any step") and "the model, module 'encoder'" in said


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("method:training_stop", "no method 'training_stop'.*training_step"),
        ("method:each", "'each' is a generator or coroutine.*capture.step"),
        ("method:forward", 'step="root"'),
    ],
)
def test_a_method_that_cannot_be_a_step_is_refused(step: str, said: str) -> None:
    with pytest.raises(tlcore.CaptureError, match=said):
        captured(step)[2].__enter__()


@pytest.mark.parametrize("step", ["", "rooot", "method:", "method:a b"])
def test_another_kind_of_step_is_a_config_error(step: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\.step"):
        captured(step)


def test_calls_outside_any_step_are_said() -> None:
    module, sink, capture = captured()
    with capture:
        for _ in range(3):
            module.training_step(X)
    assert sink.steps == []
    said = next(each for each in capture.remarks if "outside any step" in each)
    assert said.startswith("6 calls") and "'encoder'" in said and "'decoder'" in said
    assert "capture.step()" in said and 'step="outermost"' in said


def test_what_is_no_call_of_a_step_is_not_said_to_be_outside() -> None:
    module, _, capture = captured()
    with capture:
        module(X)
        torch.jit.trace(module, (X,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.func.vmap(module.encoder)(X)
        torch.compile(module.encoder, backend="eager")(X)
    said = " ".join(capture.remarks)
    assert "outside" not in said and "torch.compile compiled" in said and "torch.jit.trace" in said


def test_a_step_needs_an_open_capture_and_none_that_is_not_enabled() -> None:
    _, sink, capture = captured()
    with pytest.raises(tlcore.CaptureError, match="inside the capture's own `with` block"):
        capture.step()
    module, _, capture = captured(enabled=False)
    with capture, capture.step():
        module(X)
    assert sink.steps == []


def test_a_bracket_in_another_thread_passes_by() -> None:
    module, sink, capture = captured()

    def work() -> None:
        with capture.step():
            module(X)

    with capture, ThreadPoolExecutor(1) as pool:
        with capture.step():
            module(X)
            pool.submit(work).result(60)
        pool.submit(work).result(60)
    assert [step.calls for step in sink.steps] == [ALL, ALL]
