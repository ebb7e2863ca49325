"""``ops``: what the operators give that a module's own code uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.engine.hooks import operator_models
from tests.engine.hooks.operator_models import (
    Gate,
    Model,
    Raw,
    Twice,
    X,
    captured,
    expected,
    given_by,
    operator,
)
from tests.sinks import MemorySink
from tests.toys import Holder
from tlcore.__main__ import main


@pytest.mark.parametrize("steps", [1, 3])
def test_what_each_operator_gave_is_stored_in_order(steps: int) -> None:
    model = Model()
    sink = captured(model, "^gate", steps=steps)
    found, wanted = given_by(sink), expected(model)
    every = {f"step_{step}/{name}": value for step in range(steps) for name, value in wanted.items()}
    assert list(found) == list(every)
    for name, value in every.items():
        # Adding in place is heard as it is written in the code.
        assert torch.equal(found[name], value), name


def test_inputs_are_referred_to_and_the_calling_line_is_named() -> None:
    sink = captured(Model(), "^gate", steps=2)
    for step in (0, 1):
        silu = operator(sink, "gate/op.0000.silu", step)
        assert silu["inputs"][0] == {"from": "gate.up/op.0000.linear"}
        assert silu["function"] == "torch.nn.functional.silu"
        assert operator(sink, "gate/op.0001.mul", step)["inputs"] == [
            {"from": "gate/op.0000.silu"},
            {"parameter": "gate.scale"},
        ]
        cat = operator(sink, "gate/op.0003.cat", step)
        assert cat["inputs"] == [
            {"items": [{"from": "gate/op.0002.chunk_1"}, {"from": "gate/op.0002.chunk_0"}]}
        ]
        assert cat["kwargs"] == {"dim": {"value": "-1"}}
        linear = operator(sink, "gate.up/op.0000.linear", step)
        assert linear["inputs"][0] == {"from": "gate/inputs_0"}
        assert [each["parameter"] for each in linear["inputs"][1:]] == ["gate.up.weight", "gate.up.bias"]
        assert linear["file"].endswith("linear.py")
        turned = operator(sink, "gate/op.0006.T", step)
        assert turned["file"] == operator_models.__file__ and turned["function"] == "torch.Tensor.T"
        lines = Path(operator_models.__file__).read_text(encoding="utf-8").splitlines()
        assert lines[turned["line"] - 1].strip() == "return h.T.mT"
        assert "torch.cat(" in lines[cat["line"] - 1]


def test_what_was_changed_since_it_got_its_name_says_so() -> None:
    class Changes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            h[0].zero_()
            return h + 1

    sink = captured(Holder(Changes()), "inner")
    add = next(name for name in sink.steps[0].structures if name.endswith(".add.json"))
    inputs = operator(sink, add.removesuffix(".json"))["inputs"]
    assert inputs[0] == {"from": "inner/op.0000.mul", "changed_since": True}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["^gate$"], ["gate/"]),
        (["up"], ["gate.up/"]),
        (["^$"], ["_root/"]),
        (["^gate$", "last"], ["gate/", "last/"]),
        (["^gate$:1"], []),
        (["^gate$:0"], ["gate/"]),
    ],
)
def test_patterns_choose_modules_and_calls(patterns: list[str], prefixes: list[str]) -> None:
    found = {
        name.partition("/")[2].partition("/")[0] + "/" for name in given_by(captured(Model(), *patterns))
    }
    assert sorted(found) == sorted(prefixes)


def test_modules_need_not_be_captured_themselves() -> None:
    sink = captured(Model(), "^gate$", module_call_match="^last$")
    assert next(iter(given_by(sink))) == "step_0/gate/op.0000.silu"
    assert sink.steps[0].calls == ["gate", "last"]
    assert not any(name.startswith("step_0/gate/inputs") for name in sink.tensors)


def test_each_call_has_its_own_and_one_can_be_chosen() -> None:
    every = given_by(captured(Twice(), "gate$"))
    assert [name for name in every if name.endswith("add_")] == [
        "step_0/gate/op.0004.add_",
        "step_0/gate_1/op.0004.add_",
    ]
    second = given_by(captured(Twice(), "gate$:1"))
    assert list(second) == [name for name in every if name.startswith("step_0/gate_1/")]


def test_numbers_that_change_from_step_to_step_are_those_of_the_step() -> None:
    model, sink = Gate(), MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, ops=["^$"], log_step_ids=[]):
        for step in range(40):
            model(X, shift=float(step))
    for step in range(40):
        assert operator(sink, "_root/op.0004.add_", step)["inputs"][1] == {"value": repr(float(step))}


def test_memory_that_nobody_has_written_is_not_stored() -> None:
    found = {name.rpartition("/")[2]: value for name, value in given_by(captured(Raw(), "^$")).items()}
    names = [name.split(".", 2)[2] for name in found]
    assert names == ["mul", "copy_", "add", "setitem", "sum", "mul", "add"]
    values = list(found.values())
    assert torch.equal(values[1], X * 2) and torch.equal(values[2], X + 1) and torch.equal(values[3], X + 1)


@pytest.fixture
def custom() -> Iterator[Callable[..., None]]:
    """An operator that gives nothing and writes to what it is given, as those of vLLM do."""
    with torch.library._scoped_library("tlcore_test", "DEF") as library:
        library.define("doubled(Tensor(a!) out, Tensor x, *, Tensor(b!)? more=None) -> ()")

        def doubled(out: torch.Tensor, x: torch.Tensor, more: torch.Tensor | None = None) -> None:
            out.copy_(x * 2)
            if more is not None:
                more.copy_(x * 3)

        library.impl("doubled", doubled, "CompositeExplicitAutograd")
        yield torch.ops.tlcore_test.doubled


def test_an_operator_that_only_writes_is_stored_as_what_it_wrote(custom: Any) -> None:
    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out, more = torch.empty_like(x), torch.empty_like(x)
            custom(out, x)
            custom(out, x, more=more)
            return out + more

    sink = captured(Uses(), "^$")
    found = given_by(sink)
    assert torch.equal(found["step_0/_root/op.0000.doubled_out"], X * 2)
    assert torch.equal(found["step_0/_root/op.0001.doubled_more"], X * 3)
    used = operator(sink, "_root/op.0000.doubled")
    assert used["function"] == "torch.ops.tlcore_test.doubled" and used["file"] == __file__
    assert used["inputs"] == [{"value": "<not written yet>"}, {"from": "_root/inputs_0"}]


def test_a_parameter_is_known_by_its_data_too() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.data

    sink = captured(Detached(), "^$")
    assert operator(sink, "_root/op.0000.mul")["inputs"][1] == {"parameter": "weight"}


def test_the_filters_and_the_ledger_are_those_of_all_tensors() -> None:
    sink = captured(Model(), "^gate$", max_tensor_size=9)
    small = list(given_by(sink))
    assert small == ["step_0/gate/op.0002.chunk_0", "step_0/gate/op.0002.chunk_1"]
    assert sink.steps[0].structures["gate/op.0003.cat.json"]["skipped"].startswith("larger than")


def test_setting_a_tensors_data_is_an_operator_and_its_gradient_is_none() -> None:
    class Sets(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            y.data = x * 2
            y.grad = None
            return y + 1

    found = given_by(captured(Sets(), "^$"))
    assert [name.split(".", 2)[2] for name in found] == ["add", "mul", "set_data", "add"]
    assert torch.equal(list(found.values())[2], X * 2)


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_reader_finds_operators_in_their_call(tmp_path: Path, backend: str) -> None:
    model = Model()
    with tlcore.capture(
        model, output_dir=str(tmp_path), backend=backend, ops=["gate"], capture="both", log_step_ids=[]
    ) as capture:
        for _ in range(3):
            model(X)
    run = tlcore.open_run(capture.url)
    run.verify()
    step = run.step(2)
    call = step.call("gate")
    assert [each.name for each in call.operators][:4] == ["silu", "mul", "chunk", "cat"]
    cat = call.operators[3]
    assert [each["from"] for each in cat.operands() if "from" in each] == [
        "gate/op.0002.chunk_1",
        "gate/op.0002.chunk_0",
    ]
    wanted = expected(model)
    assert torch.equal(call.result_of(cat), wanted["gate/op.0003.cat"])
    chunks = call.result_of(call.operators[2])
    assert torch.equal(chunks[1], wanted["gate/op.0002.chunk_1"])
    assert torch.equal(run.tensor("step_2/gate/op.0001.mul"), wanted["gate/op.0001.mul"])
    assert {entry["name"] for entry in step.described} == set(step.names)
    assert not call.taps


def test_show_prints_them_with_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    with tlcore.capture(model, output_dir=str(tmp_path), ops=["gate"]) as capture:
        model(X)
    assert main(["show", capture.url, "step_0/gate"]) == 0
    shown = capsys.readouterr().out
    assert f"torch.cat at {operator_models.__file__}:" in shown
    assert "of gate/op.0002.chunk_1, gate/op.0002.chunk_0, -1" in shown
