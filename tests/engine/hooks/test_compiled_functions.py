"""Functions that are compiled beside the captured model, before or during a capture: said, never silent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.engine.hooks.tracing import TRACES

X = torch.ones(2, 4)
# Releases before 2.6 have no such place to listen at.
needs_stances = pytest.mark.skipif(
    not hasattr(torch._dynamo.eval_frame, "_callback_from_stance"),
    reason="this torch is too old to hear of compiled functions",
)


@pytest.fixture(autouse=True)
def _compiled_by_nobody() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(x).relu())
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block(x) + 1
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.block(x))
        return result


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


def _of_lambda(model: Model) -> Callable[..., Any]:
    return compiled(lambda x: model.block(x))  # type: ignore[no-any-return]


def _of_method(model: Model) -> Callable[..., Any]:
    return compiled(model.helper)  # type: ignore[no-any-return]


def _of_forward(model: Model) -> Callable[..., Any]:
    return compiled(model.block.forward)  # type: ignore[no-any-return]


def _given_the_module(model: Model) -> Callable[..., Any]:
    run = compiled(lambda module, x: module(x))
    return lambda x: run(model.block, x)


def _in_an_object(model: Model) -> Callable[..., Any]:
    class Trainer:
        def __init__(self) -> None:
            self.parts = {"model": model}

        def step(self, x: torch.Tensor) -> Any:
            return self.parts["model"](x)

    return compiled(Trainer().step)  # type: ignore[no-any-return]


MAKERS = [_of_lambda, _of_method, _of_forward, _given_the_module, _in_an_object]


@needs_stances
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("make", MAKERS, ids=[each.__name__[1:] for each in MAKERS])
def test_a_compiled_function_called_outside_any_step_is_said(make: Any, warm: bool, tmp_path: Path) -> None:
    model = Model()
    run = make(model)
    if warm:
        run(X)
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[]) as capture:
        model(X)
        run(X)
        run(X)
    (remark,) = capture.remarks
    assert "compiled with torch.compile, was called outside any step and reaches" in remark
    assert Path(__file__).name in remark and '"compiled": "taps"' in remark
    assert capture.ledger.stored > 0


def test_functions_that_reach_nothing_captured_are_not_said(tmp_path: Path) -> None:
    model, other = Model(), Model()
    apart, plain = compiled(lambda x: other(x)), compiled(lambda x: x + 1)
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[]) as capture:
        for each in (model, apart, plain, other):
            each(X)
    assert capture.remarks == []


def test_what_runs_eagerly_in_a_compiled_function_is_heard_and_not_said(tmp_path: Path) -> None:
    model = Model()

    disable: Any = torch.compiler.disable
    eagerly = disable(lambda x: model(x))
    run = compiled(lambda x: eagerly(x + 1) + 1)
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[]) as capture:
        run(X)
    assert capture.remarks == []
    assert "block.up" in tlcore.open_run(capture.url).step(0).calls


@needs_stances
@pytest.mark.parametrize("warm", [True, False])
def test_within_a_step_the_modules_tell_themselves(warm: bool, tmp_path: Path) -> None:
    model = Model()
    run = _of_lambda(model)
    if warm:
        run(X)
    with (
        tlcore.capture(model, output_dir=str(tmp_path), module_call_match=["block"]) as capture,
        capture.step(),
    ):
        run(X)
    assert "torch.compile compiled calls of module 'block'" in capture.remarks[0]
    assert not any("outside any step" in each for each in capture.remarks)


@needs_stances
def test_the_compiler_is_left_as_it_was(tmp_path: Path) -> None:
    import torch._dynamo.eval_frame as compiler

    before, finders = compiler._callback_from_stance, list(sys.meta_path)
    with tlcore.capture(Model(), output_dir=str(tmp_path)):
        with tlcore.capture(Model(), output_dir=str(tmp_path)):
            assert compiler._callback_from_stance is not before
        assert compiler._callback_from_stance is not before
    assert compiler._callback_from_stance is before
    assert sys.meta_path == finders


@needs_stances
def test_a_compiler_that_is_loaded_only_within_the_capture_is_heard(tmp_path: Path) -> None:
    script = f"""
        import sys
        import torch
        import tlcore

        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        with tlcore.capture(model, output_dir={str(tmp_path)!r}) as capture:
            assert "torch._dynamo.eval_frame" not in sys.modules
            model(torch.ones(2, 4))
            torch.compile(lambda x: model(x), backend="eager")(torch.ones(2, 4))
        import torch._dynamo.eval_frame as compiler
        assert "reaches the model" in capture.remarks[0], capture.remarks
        assert type(compiler._callback_from_stance).__name__ == "function"
        loader = compiler.__loader__
        assert loader.get_source(compiler.__name__) and "exec_module" not in vars(loader)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


@needs_stances
def test_taps_in_code_that_was_compiled_without_them_are_said(tmp_path: Path) -> None:
    class Shows(Model):
        shown: Any

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.shown(self.block(x)))
            return result

    def captured(**keys: Any) -> tuple[list[str], bool]:
        with tlcore.capture(model, output_dir=str(tmp_path), **keys) as capture:
            model(X)
        return capture.remarks, "step_0/_root/tap.h_cpu" in tlcore.open_run(capture.url).step(0).names

    model = Shows()
    model.shown = compiled(lambda x: tlcore.tap("h", x + 1))
    model(X)
    (remark,), stored = captured()
    assert not stored and remark.startswith("tlcore.tap of 'h' is in code that was compiled without it")
    assert captured(module_call_match=["head"]) == ([], False)
    # Nobody asks for a tap where none is compiled.
    model.shown = lambda x: tlcore.tap("h", x + 1)
    assert captured() == ([], True)
    if TRACES:
        model.shown = compiled(lambda x: tlcore.tap("h", x + 2))
        model(X)
        assert captured(compiled="taps") == ([], True)


@needs_stances
def test_a_tap_is_of_the_method_that_has_it(tmp_path: Path) -> None:
    class Two(Model):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return tlcore.tap("h", x + 1)

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return x - 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            way: Any = self.way
            result: torch.Tensor = self.head(way(self.block(x)))
            return result

    model = Two()
    encode, decode = compiled(model.encode), compiled(model.decode)
    encode(X), decode(X)
    for way, said in ((decode, 0), (encode, 1)):
        vars(model)["way"] = way
        with tlcore.capture(model, output_dir=str(tmp_path)) as capture:
            model(X)
        assert len([each for each in capture.remarks if "tlcore.tap of 'h'" in each]) == said


@pytest.mark.skipif(not TRACES, reason="this torch is too old for taps in compiled models")
def test_calls_outside_any_step_are_said_of_tapped_models_too(tmp_path: Path) -> None:
    model = Model()
    with tlcore.capture(model, output_dir=str(tmp_path), compiled="taps", log_step_ids=[0]) as capture:
        model(X)
        model(X)
        model.block(X)
        _of_lambda(model)(X)
        with capture.step():
            model.block(X)
    (remark,) = capture.remarks
    assert remark.startswith("2 calls outside any step are not captured, of module 'block'")
