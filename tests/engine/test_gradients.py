"""Gradients of what calls took and gave: those that autograd computes, as without capture."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.sinks import MemorySink
from tests.toys import model
from tlcore.adapters.vllm.frontend.check import check
from tlcore.analysis import stats

X = torch.linspace(-1, 1, 8).reshape(2, 4)
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Mixed(nn.Module):
    """Takes and gives nested values, of which some have gradients; one of them is not used."""

    def forward(self, pair: list[torch.Tensor], *, ids: torch.Tensor, scale: float) -> dict[str, Any]:
        a, b = pair
        return {"sum": (a + b) * scale, "unused": a * 2, "ids": ids + 1, "twice": (b, b.detach())}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)
        self.mixed, self.frozen = Mixed(), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.first(x))
        fixed = self.frozen(X)
        mixed = self.mixed([self.last(y[:, :2].repeat(1, 2)), y], ids=torch.arange(3), scale=2.0)
        result: torch.Tensor = mixed["sum"] + mixed["twice"][0] + fixed + y.t().reshape(2, 4)
        return result


def grads(module: nn.Module, *more: torch.Tensor) -> list[torch.Tensor | None]:
    return [each.grad for each in (*module.parameters(), *more)]


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(a, b, strict=True)
    )


def capture(module: nn.Module, sink: MemorySink, **keys: Any) -> tlcore.capture:
    return tlcore.capture(module, backend=sink, log_step_ids=[], log_gradients=True, **keys)


def expected(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of results by plain hooks on them, in a module that nobody captures."""
    found: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Any:
        def after(each: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor) and result.requires_grad:
                result.register_hook(lambda grad: found.update({name: grad.clone()}))  # type: ignore

        return after

    for name, each in module.named_modules():
        each.register_forward_hook(listen(name))
    module(x).square().sum().backward()
    return found


@pytest.mark.parametrize("inline", [False, True])
def test_they_are_those_of_autograd_and_change_nothing(inline: bool) -> None:
    module, plain = Net(), Net()
    x, other = (X.clone().requires_grad_() for _ in range(2))
    right = expected(plain, other)
    sink = MemorySink()
    with capture(module, sink, inline=inline) as captured:
        for _ in range(2):
            module.zero_grad()
            x.grad = None
            with captured.step():
                module(x).square().sum().backward()
            assert same(grads(module, x), grads(plain, other)) and x._backward_hooks is None
    for step in range(2):
        for name in ("", "first", "act", "last"):
            stored = sink.tensors[f"step_{step}/{name or '_root'}/grad_outputs_cpu"]
            assert torch.equal(stored, right[name])
        assert other.grad is not None
        assert torch.equal(sink.tensors[f"step_{step}/_root/grad_inputs_0_cpu"], other.grad)
        assert torch.equal(sink.tensors[f"step_{step}/last/grad_outputs_cpu"], right["last"])
        into_mixed = sink.tensors[f"step_{step}/mixed/grad_inputs_0_0_cpu"]
        assert torch.equal(into_mixed, right["last"])
    ledger = captured.ledger
    assert ledger.balanced and not ledger.failed
    # In each step the sum that nobody used; what needs no gradient is not counted.
    assert ledger.reasons == {"skipped: no gradient came": 2}
    assert not any(name.startswith("step_0/frozen/grad") for name in sink.tensors)
    kinds = sink.steps[0].structures["mixed/grad_inputs.json"]
    assert kinds["kwargs"]["items"]["ids"]["skipped"] == "requires no gradient"
    assert kinds["kwargs"]["items"]["scale"] == {"type": "float", "value": 2.0}


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x * 3


def test_a_second_backward_goes_on_counting(tmp_path: Path) -> None:
    module = model()
    x = X.clone().requires_grad_()
    keyed: dict[str, Any] = {"output_dir": str(tmp_path), "log_gradients": True}
    with tlcore.capture(module, **keyed) as captured, captured.step():
        loss = module(x).square().sum()
        loss.backward(retain_graph=True)
        (loss * 3).backward()
    step = tlcore.open_run(captured.url).step(0)
    call = step.call("2")
    once = call.grad_outputs
    assert torch.equal(step["step_0/2/grad_outputs~2_cpu"], 3 * once)
    assert call.structure("grad_inputs~2")["items"][0]["type"] == "tensor"
    assert captured.ledger.stored == captured.ledger.captured == 24
    tlcore.open_run(captured.url).verify()


def test_each_backward_has_a_side_of_its_own() -> None:
    sink = MemorySink()
    x = X.clone().requires_grad_()
    with capture(Two(), sink) as captured, captured.step():
        a, b = captured._model(x)
        a.sum().backward(retain_graph=True)
        # What was made last has its gradient first.
        (a.sum() * 5 + b.sum() * 2).backward(retain_graph=True)
        (b.sum() * 7).backward()
    values = {name: float(each[0, 0]) for name, each in sink.tensors.items() if "/grad_outputs" in name}
    numbers = {"_0": 1.0, "~2_0": 5.0, "~2_1": 2.0, "~3_1": 7.0}
    assert values == {f"step_0/_root/grad_outputs{at}_cpu": value for at, value in numbers.items()}
    assert captured.ledger.reasons == {"skipped: no gradient came": 2}


def test_a_backward_in_another_thread_is_told() -> None:
    module, sink = model(), MemorySink()
    with capture(module, sink, module_call_match="^2$") as captured, captured.step():
        backward = threading.Thread(target=module(X).sum().backward)
        backward.start()
        backward.join(60)
    assert captured.ledger.reasons == {"skipped: its gradient came in another thread": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_adds_none(reentrant: bool) -> None:
    module, plain = model(), model()
    x, other = (X.clone().requires_grad_() for _ in range(2))
    sink = MemorySink()
    with capture(module, sink) as captured, captured.step():
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    plain(other).sum().backward()
    assert same(grads(module, x), grads(plain, other))
    assert sink.steps[0].calls == ["_root", "0", "1", "2"] and captured.ledger.balanced
    outputs = [name for name in sink.tensors if "/grad_outputs" in name]
    assert len(outputs) == (0 if reentrant else 4) and not any("~" in name for name in sink.tensors)


@pytest.mark.parametrize("way", ["grad", "create_graph", "none", "no_grad"])
def test_ways_to_ask_for_gradients(way: str, caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    x = X.clone().requires_grad_()
    sink = MemorySink()
    with capture(module, sink, module_call_match="^2$") as captured, captured.step():
        if way == "no_grad":
            with torch.no_grad():
                module(x)
        else:
            y = module(x)
        if way == "grad":
            torch.autograd.grad(y.sum(), y)
        if way == "create_graph":
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            first.square().sum().backward()  # type: ignore[no-untyped-call]
    came = sorted(name for name in sink.tensors if "grad" in name)
    out, into = "step_0/2/grad_outputs_cpu", "step_0/2/grad_inputs_0_cpu"
    expected = {"grad": [out], "create_graph": [into, "step_0/2/grad_inputs~2_0_cpu", out]}
    assert came[:3] == expected.get(way, [])
    missing = captured.ledger.reasons["skipped: no gradient came"]
    assert missing == {"grad": 1, "none": 2}.get(way, 0) and captured.ledger.balanced
    said = any("no call within a step had a tensor" in text for text in captured.remarks)
    assert said == (way == "no_grad")


def test_the_same_filters_hold(tmp_path: Path) -> None:
    module = model()
    x = X.clone().requires_grad_()
    keys: dict[str, Any] = {"module_call_match": "^[02]$", "max_tensor_size": 4, "capture": "both"}
    keyed: dict[str, Any] = {"output_dir": str(tmp_path), "log_gradients": True}
    with tlcore.capture(module, **keyed, **keys) as captured, captured.step():
        module(x).sum().backward()
    ledger = captured.ledger
    assert ledger.balanced and (ledger.stored, ledger.skipped) == (2, 6)
    run = tlcore.open_run(captured.url)
    assert list(run.step(0)) == ["step_0/2/outputs_cpu", "step_0/2/grad_outputs_cpu"]
    assert [each.direction for each in stats(captured.url).tensors] == ["outputs", "grad_outputs"]


def test_compare_names_the_gradient_that_differs(tmp_path: Path) -> None:
    urls = []
    keys: dict[str, Any] = {"output_dir": str(tmp_path), "log_gradients": True}
    for factor in (1.0, 2.0):
        module = model()
        x = X.clone().requires_grad_()
        with tlcore.capture(module, **keys) as captured, captured.step():
            y = module(x)
            y.register_hook(lambda grad, factor=factor: grad * factor)
            y.sum().backward()
        urls.append(captured.url)
    result = tlcore.compare(*urls)
    assert not result.equal
    first = result.first_divergence
    assert first is not None and (first.module, first.direction) == ("2", "grad_inputs")
    assert first.born and "born here" in str(first)


def test_a_step_that_is_only_a_call_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    sink = MemorySink()
    with pytest.raises(tlcore.CaptureError, match=r"capture\.step\(\)"), capture(module, sink):
        module(X).sum().backward()
    assert sink.closed and len(sink.tensors) == 8
    assert sum("log_gradients" in record.message for record in caplog.records) == 1
    with pytest.raises(tlcore.ConfigError, match="gradient"):
        check({"log_gradients": True})


def test_a_leaf_is_pickled_without_a_word_while_a_step_is_over() -> None:
    module = model()
    x = X.clone().requires_grad_()
    with capture(module, MemorySink()) as captured, captured.step():
        module(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(copy.deepcopy(x), X)


def test_a_gradient_that_cannot_be_stored_does_not_end_backward(caplog: pytest.LogCaptureFixture) -> None:
    module, plain = model(), model()

    def broken(*_: Any) -> Any:
        raise ValueError("broken")

    x, other = (X.clone().requires_grad_() for _ in range(2))
    with caplog.at_level(logging.WARNING), capture(module, MemorySink()) as captured, captured.step():
        y = module(x)
        with mock.patch.object(captured.session._collector, "take", broken):
            y.sum().backward()
    plain(other).sum().backward()
    assert same(grads(module, x), grads(plain, other))
    assert captured.ledger.balanced and captured.ledger.captured == 16
    assert captured.ledger.failed == 8 and captured.ledger.stored == 8
    assert any("could not be captured" in text for text in caplog.messages)
