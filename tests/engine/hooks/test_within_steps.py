"""A model that changes while a step is open: what is stored is what a module handed on, or it is said."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.sinks import MemorySink
from tests.toys import hook_count, model
from tlcore.hotpath.intercept import WHOLE_CALL

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Shifts(ModelHook):  # type: ignore[misc]
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tuple(arg + 1 for arg in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 3


@contextmanager
def wrapped(part: nn.Module) -> Iterator[None]:
    inner = part.forward
    part.forward = lambda x: inner(x) * 2
    yield
    part.forward = inner


@contextmanager
def patched(part: nn.Module) -> Iterator[None]:
    with mock.patch.object(part, "forward", lambda x: x * 5):
        yield


@contextmanager
def offloaded(part: nn.Module) -> Iterator[None]:
    add_hook_to_module(part, Shifts())
    yield
    remove_hook_from_module(part)


class Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 5


@contextmanager
def of_another_class(part: nn.Module) -> Iterator[None]:
    """There and back, where the one class's forward does not take the other's module."""
    before = type(part)
    part.__class__ = Shifted
    yield
    part.__class__ = before


@contextmanager
def restored(part: nn.Module) -> Iterator[None]:
    """One that was hooked before the capture, and is not for a while."""
    remove_hook_from_module(part)
    yield
    add_hook_to_module(part, Shifts())


@pytest.mark.parametrize("change", [wrapped, patched, offloaded, restored, of_another_class])
@pytest.mark.parametrize("step", ["root", "outermost", "method:go"])
@pytest.mark.parametrize("again", [1, 2])
def test_a_forward_replaced_in_an_open_step_is_heard(
    change: Callable[[nn.Module], Any], step: str, again: int
) -> None:
    module = model()
    sink = MemorySink()
    if change is restored:
        add_hook_to_module(module[0], Shifts())
    right = []

    def go() -> None:
        right.append(module(X))
        with change(module[0]):
            right.extend(module(X) for _ in range(again))
        right.append(module(X))

    object.__setattr__(module, "go", go)
    with torch.no_grad(), tlcore.capture(module, backend=sink, log_step_ids=[], step=step) as captured:
        if step.startswith("method"):
            cast(Any, module).go()
        else:
            with captured.step():
                go()
        right.append(module(X))
    assert not torch.equal(right[0], right[1]) and torch.equal(right[0], right[-1])
    assert len(sink.steps) == (1 if step.startswith("method") else 2) and not captured.ledger.failed
    for call in range(again + 2):
        suffix = f"_{call}" if call else ""
        handed_on = sink.tensors[f"step_0/1{suffix}/inputs_0_cpu"]
        assert torch.equal(sink.tensors[f"step_0/0{suffix}/outputs_cpu"], handed_on)
        assert torch.equal(sink.tensors[f"step_0/_root{suffix}/outputs_cpu"], right[call])
    assert WHOLE_CALL not in vars(module[0]) and "tlcore" not in type(module[0].forward).__module__
    with torch.no_grad():
        assert torch.equal(module(X), right[0])


def test_a_forward_that_the_model_itself_replaces_for_a_call_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with wrapped(self.part):
                return cast(torch.Tensor, self.part(x))

    with tlcore.capture(Doubles(), backend=MemorySink()) as captured:
        captured._model(X)
    assert any("forward of part was replaced" in text for text in captured.remarks)


@pytest.mark.parametrize("bracket", [False, True])
def test_modules_that_come_within_a_step_are_heard_from_then_on(bracket: bool) -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4)])
            self.gone: list[nn.Module] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.parts[0](x)
            self.gone.append(self.parts[0])
            self.parts[0] = nn.Linear(4, 4)
            x = self.parts[0](x)
            self.parts[0] = nn.Sequential(self.parts[0], nn.Tanh())
            self.head = nn.Linear(4, 2)
            x = self.head(self.parts[0](x))
            # The first one again, at its old place.
            self.parts[0] = self.gone[0]
            self.last = self.parts[0](torch.ones(4))
            del self.head
            return x

    grows = Grows()
    sink = MemorySink()
    with torch.no_grad(), tlcore.capture(grows, backend=sink, log_step_ids=[]) as captured:
        for _ in range(2):
            if bracket:
                with captured.step():
                    result = grows(X)
            else:
                result = grows(X)
    for step in range(2):
        calls = ["_root", "parts.0", "parts.0_1", "parts.0_2", "parts.0.0", "parts.0.1", "head", "parts.0_3"]
        assert sink.steps[step].calls == calls
    assert torch.equal(sink.tensors["step_1/head/outputs_cpu"], result)
    assert torch.equal(sink.tensors["step_1/parts.0_3/outputs_cpu"], grows.last)
    assert captured.ledger.balanced and not captured.ledger.failed
    assert hook_count(grows) == 0 and hook_count(grows.gone[0]) == 0 and not captured.remarks
    assert not nn.modules.module._global_module_registration_hooks


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step", ["root", "outermost", "bracket"])
def test_what_backward_recomputes_is_no_call_and_no_step(step: str, reentrant: bool) -> None:
    module = model().train()
    sink = MemorySink()
    kind = "root" if step == "bracket" else step
    x = X.clone().requires_grad_()
    with tlcore.capture(module, backend=sink, log_step_ids=[], step=kind) as captured:
        if step == "bracket":
            with captured.step():
                checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        else:
            checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        module(x)
    assert [each.calls for each in sink.steps] == [["_root", "0", "1", "2"]] * 2
    assert not captured.remarks


def test_a_capture_that_is_over_keeps_no_model_alive() -> None:
    module = model()
    known = weakref.ref(module[0])
    with tlcore.capture(module, backend=MemorySink(), step="outermost") as captured:
        module(X)
    del module
    gc.collect()
    assert known() is None and captured.ledger.stored
    with pytest.raises(tlcore.CaptureError, match="gone"), captured:
        pass


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shown: torch.Tensor = tlcore.tap("x", self.inner(x))
        return shown


class Patches(nn.Module):
    """Gives its part's class another ``forward`` while it runs, as context managers of libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = Part.forward
        with mock.patch.object(Part, "forward", lambda self, x: before(self, x) * 100):
            x = self.part(x)
        found: torch.Tensor = self.part(x)
        return found


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("match", [".*", "^part$", r"tap\.x$"])
def test_a_class_that_gets_another_forward_within_a_step(match: str, bracket: bool) -> None:
    torch.manual_seed(0)
    model, sink = Patches(), MemorySink()
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    first = model.part.inner(x)
    expected = [first, model.part.inner(first * 100)]
    keys: dict[str, Any] = {"log_step_ids": [], "module_call_match": match}
    with tlcore.capture(model, backend=sink, inline=True, **keys) as capture:
        for _ in range(2):
            if bracket:
                with capture.step():
                    result = model(x)
            else:
                result = model(x)
            assert torch.equal(result, expected[1])
    for step in (0, 1):
        for call, value in (("part", expected[0]), ("part_1", expected[1])):
            if match != "^part$":
                assert torch.equal(sink.tensors[f"step_{step}/{call}/tap.x_cpu"], value)
            if "tap" not in match:
                shown = value * 100 if call == "part" else value
                assert torch.equal(sink.tensors[f"step_{step}/{call}/outputs_cpu"], shown)


@pytest.mark.parametrize("how", ["forward", "class"])
def test_a_module_whose_taps_alone_are_captured_changes_between_steps(how: str) -> None:
    class Other(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shown: torch.Tensor = tlcore.tap("x", self.inner(x) + 1)
            return shown

    part, sink = Part(), MemorySink()
    model = nn.Sequential(part)
    x = torch.ones(2, 4)
    with tlcore.capture(model, backend=sink, inline=True, log_step_ids=[], module_call_match=r"tap\.x$"):
        model(x)
        expected = part.inner(x) + 1
        with mock.patch.object(Part, "forward", Part.forward if how == "class" else Other.forward):
            if how == "class":
                part.__class__ = Other
            assert torch.equal(model(x), expected)
    assert torch.equal(sink.tensors["step_1/0/tap.x_cpu"], expected)


@pytest.mark.parametrize("step", ["method:generate", "root"])
def test_a_class_that_gets_another_method_between_steps(step: str) -> None:
    class Generates(Part):
        def generate(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self(x)
            return found

    model, x = Generates(), torch.ones(2, 4)
    with tlcore.capture(model, backend=MemorySink(), log_step_ids=[], step=step):
        expected = model.generate(x) + 1
        before = Generates.generate
        with mock.patch.object(Generates, "generate", lambda self, x: before(self, x) + 1):
            assert torch.equal(model.generate(x), expected)
