"""``ops``: what the operators give that a module's own code uses."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import tlcore
from tests.sinks import MemorySink
from tests.toys import Fails, Holder
from tlcore.__main__ import main
from tlcore.engine.hooks import operators

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))


class Gate(nn.Module):
    """Uses operators of every kind: functions, methods, properties, indexing, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor, shift: float = 0.5) -> torch.Tensor:
        h = functional.silu(self.up(x)) * self.scale
        first, second = h.chunk(2, -1)
        h = torch.cat([second, first], dim=-1)
        h += shift
        h[0] = 1.0
        return _turned(h)


def _turned(h: torch.Tensor) -> torch.Tensor:
    return h.T.mT


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate = Gate()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.gate(x)).tanh()


def captured(model: nn.Module, *ops: str, steps: int = 1, given: Any = X, **keys: Any) -> MemorySink:
    sink = MemorySink()
    with tlcore.capture(model, backend=sink, inline=True, ops=list(ops), log_step_ids=[], **keys) as capture:
        for _ in range(steps):
            model(given)
    assert capture.ledger.balanced and not capture.ledger.failed
    return sink


def given_by(sink: MemorySink) -> dict[str, torch.Tensor]:
    """What operators gave, by name without the device."""
    return {name.removesuffix("_cpu"): value for name, value in sink.tensors.items() if "/op." in name}


def operator(sink: MemorySink, name: str, step: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = sink.steps[step].structures[f"{name}.json"]["operator"]
    return found


def expected(model: Model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        up = functional.linear(X, model.gate.up.weight, model.gate.up.bias)
        silu = functional.silu(up)
        mul = silu * model.gate.scale
        a, b = mul[:, :2], mul[:, 2:]
        cat = torch.cat([b, a], 1)
        plus = cat + 0.5
        put = plus.clone()
        put[0] = 1.0
    return {
        "gate.up/op.0000.linear": up,
        "gate/op.0000.silu": silu,
        "gate/op.0001.mul": mul,
        "gate/op.0002.chunk_0": a,
        "gate/op.0002.chunk_1": b,
        "gate/op.0003.cat": cat,
        "gate/op.0004.add_": plus,
        "gate/op.0005.setitem": put,
        "gate/op.0006.T": put.T,
        "gate/op.0007.mT": put,
    }


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
        assert turned["file"] == __file__ and turned["function"] == "torch.Tensor.T"
        lines = Path(__file__).read_text(encoding="utf-8").splitlines()
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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> Any:
        return self.gate(self.gate(x, 0.25), 0.75)


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


class Raw(nn.Module):
    """Memory that nobody has written holds anything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(6, 4)
        out[:3] = x
        view = out[3:]
        view.copy_(x * 2)
        other = x.new_empty(3, 4)
        torch.add(x, 1, out=other)
        whole = torch.empty_like(x)
        whole[:] = other
        return out + 0 * whole.sum()


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
            thread.join()
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
    monkeypatch.setattr(operators, "module_of", broken)
    with caplog.at_level(logging.WARNING, "tlcore"):
        sink = MemorySink()
        with tlcore.capture(model, backend=sink, ops=["gate"]):
            assert torch.equal(model(X), plain)
    assert "an operator could not be captured: RuntimeError: broken" in caplog.text


def test_the_filters_and_the_ledger_are_those_of_all_tensors() -> None:
    sink = captured(Model(), "^gate$", max_tensor_size=9)
    small = list(given_by(sink))
    assert small == ["step_0/gate/op.0002.chunk_0", "step_0/gate/op.0002.chunk_1"]
    assert sink.steps[0].structures["gate/op.0003.cat.json"]["skipped"].startswith("larger than")


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
    assert f"torch.cat at {__file__}:" in shown
    assert "of gate/op.0002.chunk_1, gate/op.0002.chunk_0, -1" in shown
