"""``ops`` changes nothing of the model, and says what it leaves out."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.engine.hooks.operator_models import Gate, Model, Raw, Twice, X, captured, given_by
from tests.sinks import MemorySink
from tests.toys import Fails, Holder
from tlcore.engine.hooks import operators


def _layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=False)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.layers(x[None])[0]) * 2


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x[None], x[None], x[None])[0][0] + 1


class Recomputes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.gate, x, use_reentrant=False)


class Inside(nn.Module):
    """Puts modes of its own around its operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.device("cpu"), _Counts():
            return x * torch.arange(4) + torch.ones(4)


class _Counts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Maps(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.func.vmap(lambda row: row.softmax(-1) * 2)(x) + 1


MODELS: list[Callable[[], nn.Module]] = [Model, Twice, Raw, Encoder, Attends, Recomputes, Inside, Maps]
AROUND: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", MODELS, ids=[each.__name__ for each in MODELS])
def test_the_result_is_that_without_capture(make: Callable[[], nn.Module], train: bool, around: str) -> None:
    torch.manual_seed(5)
    model = Holder(make()).train(train)
    # Not contiguous, which some kernels treat in another way.
    given = torch.randn(4, 3).T
    with AROUND[around]():
        torch.manual_seed(1)
        plain = model(given)
        torch.manual_seed(1)
        sink = MemorySink()
        with tlcore.capture(model, backend=sink, inline=True, ops=["inner"]) as capture:
            found = model(given)
    assert torch.equal(plain, found) and plain.dtype == found.dtype and plain.stride() == found.stride()
    assert capture.ledger.balanced


def test_the_fast_path_stays_and_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Encoder().eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "tlcore"):
        sink = captured(model, ".")
    assert not any(name.startswith("step_0/layers") for name in given_by(sink))
    assert "step_0/last/op.0000.linear" in given_by(sink)
    assert "ops: not captured in layers" in caplog.text and "set_fastpath_enabled(False)" in caplog.text
    caplog.clear()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), caplog.at_level(logging.WARNING, "tlcore"):
            sink = captured(model, ".")
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert any(name.startswith("step_0/layers.layers.0.linear1/op.") for name in given_by(sink))
    assert "not captured" not in caplog.text


def test_a_pattern_that_finds_no_module_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tlcore"):
        captured(Model(), "^gatte$", "^gate$")
    assert "ops '^gatte$': no module has a name that it finds; did you mean 'gate'" in caplog.text


def test_a_module_without_operators_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tlcore"):
        captured(Holder(nn.Identity()), "inner")
    assert "ops 'inner': no operator was captured in the modules that it selects" in caplog.text


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"ops": ["("]}, r"\$\.ops\[0\]"),
        ({"ops": [""]}, r"\$\.ops\[0\]"),
        ({"ops": ["a"], "compiled": "taps"}, r"\$\.ops: operators can be captured in eager steps only"),
    ],
)
def test_bad_configurations_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(tlcore.ConfigError, match=problem):
        tlcore.capture(Model(), backend=MemorySink(), **keys)


def test_what_backward_computes_once_more_is_not_captured_again() -> None:
    model, sink = Recomputes().train(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, ops=["gate$"]) as capture, capture.step():
        model(X.clone().requires_grad_()).sum().backward()
    assert len([name for name in given_by(sink) if name.endswith("cat")]) == 1


def test_other_threads_are_not_heard() -> None:
    class Spreads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: found.append(x.exp()))
            thread.start()
            thread.join(60)
            return found[0] + 1

    assert [name.rpartition(".")[2] for name in given_by(captured(Spreads(), "^$"))] == ["add"]


def test_a_call_that_raises_leaves_no_mode_behind() -> None:
    model = Holder(Fails(ValueError("no")))
    with pytest.raises(ValueError, match="no"), tlcore.capture(model, backend=MemorySink(), ops=["."]):
        model(X)
    assert operators._innermost() is None


def test_what_goes_wrong_in_capturing_is_not_the_models_business(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    model = Model()
    plain = model(X)
    monkeypatch.setattr(operators, "module_at", broken)
    with caplog.at_level(logging.WARNING, "tlcore"):
        sink = MemorySink()
        with tlcore.capture(model, backend=sink, ops=["gate"]):
            assert torch.equal(model(X), plain)
    assert "an operator could not be captured: RuntimeError: broken" in caplog.text
