"""Operators that write to what they are given: what that was before, and what is something else since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tlcore
from tests.engine.hooks.operator_models import X, given_by, operator
from tests.sinks import MemorySink
from tests.toys import Holder
from tlcore.engine.hooks.shared_memory import overlap

Around = Callable[[], AbstractContextManager[Any]]
# Nobody counts changes of tensors that are made in inference mode.
AROUND = pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])


def captured(model: nn.Module, around: Around, *ops: str, steps: int = 2) -> MemorySink:
    sink = MemorySink()
    with (
        around(),
        tlcore.capture(model, backend=sink, inline=True, ops=list(ops), log_step_ids=[]) as capture,
    ):
        for _ in range(steps):
            model(X.clone())
    assert capture.ledger.balanced and not capture.ledger.failed
    return sink


def given_to(sink: MemorySink, step: int = 1) -> dict[str, list[Any]]:
    """The first input of each operator that is a tensor, by what follows the call's directory."""
    names = [name.removesuffix(".json") for name in sink.steps[step].structures if "/op." in name]
    return {name: operator(sink, name, step)["inputs"] for name in names}


def names_of(inputs: dict[str, list[Any]], call: str = "inner") -> dict[str, Any]:
    """What each operator was given first: a name, with ``!`` where it has changed since."""
    return {
        name.removeprefix(f"{call}/op.").partition(".")[2]: "".join(
            str(value).removeprefix(f"{call}/") if kind != "changed_since" else "!"
            for kind, value in given[0].items()
        )
        for name, given in inputs.items()
    }


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        left, right = h[:, :2], h[:, 2:]
        left.mul_(3)
        h.sub(1)
        functional.relu(h, inplace=True)
        h.div(2)
        left.neg()
        h[0] = 7.0
        torch.add(x, 1, out=h)
        h.sum()
        return right.exp()


@AROUND
def test_what_an_operator_writes_to_is_told_as_it_was(around: Around) -> None:
    sink = captured(Holder(InPlace()), around, "inner")
    told = names_of(given_to(sink))
    assert told == {
        "mul": "inputs_0",
        "getitem": "op.0000.mul",
        "mul_": "op.0001.getitem",
        "sub": "op.0000.mul!",
        "relu": "op.0000.mul!",
        "div": "op.0005.relu",
        "neg": "op.0003.mul_!",
        "setitem": "op.0005.relu",
        "add": "inputs_0",
        "sum": "op.0009.add",
        "exp": "op.0002.getitem!",
    }
    (out,) = operator(sink, "inner/op.0009.add", 1)["kwargs"].values()
    assert out == {"from": "inner/op.0008.setitem"}
    values = {name.partition("op.")[2]: value for name, value in given_by(sink).items()}
    h = X * 2
    h[:, :2] *= 3
    assert torch.equal(values["0003.mul_"], h[:, :2]) and torch.equal(values["0005.relu"], h.relu())
    assert torch.equal(values["0009.add"], X + 1)


class Whole(nn.Module):
    """Code of which no operator is heard changes what a part has given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        h += x
        return self.second(self.act(h))


@AROUND
def test_what_code_has_changed_that_nobody_heard_is_no_result_any_more(around: Around) -> None:
    told = names_of(given_to(captured(Whole(), around, "first", "second")), "second")
    # Of what changes are counted, it is told what it was.
    name = "inputs_0" if around is torch.inference_mode else "first/op.0000.linear!"
    assert told["linear"] == name
    told = given_to(captured(Holder(Whole()), around, "^inner$", "second"))
    assert told["inner.second/op.0000.linear"][0] == {"from": "inner.act/outputs"}


@pytest.mark.parametrize("change", ["__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"])
@AROUND
def test_signs_that_work_in_place_are_heard_as_such(around: Around, change: str) -> None:
    class Signs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = x.int()
            shown = whole[:]
            getattr(whole, change)(1)
            return shown + whole

    told = given_to(captured(Holder(Signs()), around, "inner"))
    kind = change.strip("_")
    assert told[f"inner/op.0002.{kind}"][0] == {"from": "inner/op.0000.int"}
    shown = {"from": "inner/op.0001.getitem", "changed_since": True}
    assert told["inner/op.0003.add"] == [shown, {"from": f"inner/op.0002.{kind}"}]


@pytest.fixture
def kernel() -> Iterator[Any]:
    """An operator that writes to one argument and gives another tensor, as some of vLLM's do."""
    with torch.library._scoped_library("tlcore_test", "DEF") as library:
        library.define("both(Tensor x, Tensor(a!) out, int times=2) -> Tensor")

        def both(x: torch.Tensor, out: torch.Tensor, times: int = 2) -> torch.Tensor:
            out.copy_(x * times)
            return x + times

        library.impl("both", both, "CompositeExplicitAutograd")
        yield torch.ops.tlcore_test.both


@AROUND
def test_of_a_kernel_that_gives_and_writes_both_are_stored(around: Around, kernel: Any) -> None:
    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            both = torch.zeros(3, 8)
            out, rest = torch.split(both, 4, -1)
            given = kernel(x, out)
            torch.neg(out)
            torch.exp(rest)
            torch.abs(both)
            return given + 1

    sink = captured(Holder(Uses()), around, "inner")
    values = {name.partition("op.")[2]: value for name, value in given_by(sink).items()}
    assert torch.equal(values["0002.both_result"], X + 2) and torch.equal(values["0002.both_out"], X * 2)
    told = given_to(sink)
    assert told["inner/op.0002.both"][1] == {"from": "inner/op.0001.split_0"}
    assert told["inner/op.0003.neg"] == [{"from": "inner/op.0002.both_out"}]
    # What lies beside it in the same memory is as it was.
    assert told["inner/op.0004.exp"][0]["from"] == "inner/op.0001.split_1"
    assert told["inner/op.0005.abs"] == [{"from": "inner/op.0000.zeros", "changed_since": True}]
    assert told["inner/op.0006.add"][0] == {"from": "inner/op.0002.both_result"}
    if around is torch.inference_mode:
        assert told["inner/op.0004.exp"] == [{"from": "inner/op.0001.split_1"}]


def test_memory_that_something_else_has_written_is_not_told_as_empty() -> None:
    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            # As a kernel of Triton does, of which torch hears nothing.
            out.numpy()[:] = x.numpy()
            return out + 1

    told = given_to(captured(Holder(Kernel()), torch.no_grad, "inner"))
    (name,) = (each for each in told if each.endswith(".add"))
    assert told[name][0] == {"unknown": "float32[3, 4]"}


@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse", "subclass"])
def test_tensors_of_other_kinds_are_told_too(kind: str) -> None:
    class Own(torch.Tensor):
        pass

    def made() -> torch.Tensor:
        if kind in ("nested", "jagged"):
            layout = torch.jagged if kind == "jagged" else torch.strided
            return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
        return torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(2, 3).as_subclass(Own)

    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            first, other = made(), made()
            shown = first.detach()
            first.mul_(2)
            return shown * 2, other * 3

    told = given_to(captured(Holder(Uses()), torch.no_grad, "inner"))
    (written,) = (each for name, each in told.items() if name.endswith(".mul_"))
    assert "changed_since" not in written[0]
    *_, shown, other = (each for name, each in told.items() if name.endswith(".mul"))
    assert "changed_since" not in other[0]
    assert shown[0].get("changed_since", kind != "subclass")


def test_views_side_by_side_are_told_apart() -> None:
    whole = torch.zeros(2, 5, 12)
    query, key, value = torch.split(whole, [4, 4, 4], -1)
    heads = [each.view(2, 5, 2, 2).transpose(1, 2) for each in (query, key, value)]
    assert overlap(whole, key) and overlap(query, heads[0]) and overlap(heads[0][:, 1], query)
    assert not overlap(query, key) and not overlap(heads[0], heads[1]) and not overlap(heads[2], key)
    assert not overlap(whole[0], whole[1]) and not overlap(heads[0][:, 0], heads[0][:, 1])
    assert not overlap(whole, whole.clone()) and not overlap(whole[:0], whole)
    assert overlap(whole.view(-1)[3:9], whole[0, 0]) and overlap(whole.view(torch.int32), whole)
    # Bytes of 0 to 3 and 4 to 11 of each 12 numbers, in another dtype.
    assert not overlap(query.view(torch.int32), whole.view(torch.int8)[..., 16:])
