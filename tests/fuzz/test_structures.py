"""Random module trees with random arguments and results: captured by each backend, read back, equal."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tlcore
from tests.fuzz.settings import cases
from tlcore.reader import OpaqueObject
from tlcore.reader.tensor_bytes import payload

pytestmark = pytest.mark.slow
_fresh = itertools.count()
Point = namedtuple("Point", ["x", "y"])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64),
    *(torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@dataclass
class Pair:
    first: Any
    second: Any


class Odd:
    """Something that no capture looks into."""


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, shape and strides: transposed, sliced, expanded, conjugated, requiring grad."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 3))
    count = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    tensor = data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    how = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "conj", "grad", "offset"]))
    if how == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif how == "sliced" and tensor.dim():
        tensor = tensor[..., ::2]
    elif how == "expanded":
        tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    elif how == "conj" and dtype.is_complex:
        tensor = tensor.conj()
    elif how == "offset" and tensor.dim() and tensor.shape[0] > 1:
        tensor = tensor[1:]
    elif how == "grad" and dtype in (torch.float32, torch.float64):
        tensor = tensor.clone().requires_grad_() * 1
    return tensor


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(Odd)
    | st.sampled_from([10**30, float("nan"), float("-inf"), "nan", "\ud800", "\0"])
)
KEYS = (
    st.text(max_size=4)
    | st.integers(0, 3)
    | st.sampled_from(["a_b", "a", "b", "kwargs", "items", "../x", "1"])
)
VALUES = st.recursive(
    tensors() | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.builds(Pair, inner, inner)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=6,
)
NAMES = st.text(min_size=1, max_size=5).filter(lambda name: "." not in name and not hasattr(nn.Module, name))
IDENTIFIERS = st.sampled_from(["x", "y", "hidden_states", "inputs", "self_", "0", "a b"])


class Scripted(nn.Module):
    """Returns what it is told to, call by call, after it has called its children so often each."""

    def __init__(self, children: dict[str, nn.Module], calls: int) -> None:
        super().__init__()
        self.order: list[str] = []
        for name, child in children.items():
            if name not in dir(self):
                self.add_module(name, child)
                self.order += [name] * calls
        self.script: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.order:
            child = self.get_submodule(name)
            assert isinstance(child, Scripted)
            arguments, keywords, _ = child.script[len(child.seen) % len(child.script)]
            child(*arguments, **keywords)
        result = self.script[len(self.seen) % len(self.script)][2]
        self.seen.append((args, kwargs, result))
        return result


def trees() -> st.SearchStrategy[Scripted]:
    leaf = st.builds(Scripted, st.just({}), st.just(0))
    return st.recursive(
        leaf,
        lambda inner: st.builds(Scripted, st.dictionaries(NAMES, inner, max_size=3), st.integers(1, 3)),
        max_leaves=5,
    )


@st.composite
def models(draw: st.DrawFn) -> Scripted:
    """A tree of modules, each with what it is called with and returns, up to three different times."""
    root = Scripted(
        {f"top{n}": child for n, child in enumerate(draw(st.lists(trees(), min_size=1, max_size=2)))}, 1
    )
    for module in root.modules():
        assert isinstance(module, Scripted)
        calls = draw(st.integers(1, 3))
        for _ in range(calls):
            args = tuple(draw(st.lists(VALUES, max_size=2)))
            kwargs = draw(st.dictionaries(IDENTIFIERS, VALUES, max_size=2))
            module.script.append((args, kwargs, draw(VALUES)))
    return root


def assert_same(expected: Any, found: Any) -> None:
    """A value and what was read back of it: the same tensors, scalars and containers."""
    if isinstance(expected, torch.Tensor):
        whole = expected.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        assert isinstance(found, torch.Tensor) and (found.dtype, found.shape) == (whole.dtype, whole.shape)
        assert bytes(payload(found)) == bytes(payload(whole))
    elif isinstance(expected, Odd):
        assert isinstance(found, OpaqueObject) and found.class_name.endswith("Odd")
    elif is_dataclass(expected):
        assert_same([getattr(expected, field.name) for field in fields(expected)], list(found.values()))
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert_same(list(expected.values()), list(found.values()))
        assert [str(key) for key in expected][:1] == list(found)[:1]
    elif isinstance(expected, (tuple, list)):
        assert isinstance(found, type(expected)) or type(found).__name__ == type(expected).__name__
        assert len(found) == len(expected)
        assert getattr(found, "_fields", None) == getattr(expected, "_fields", None)
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float) and math.isnan(expected):
        assert isinstance(found, float) and math.isnan(found)
    else:
        assert type(found) is type(expected) and found == expected


def places(backend: str, directory: str) -> dict[str, Any]:
    if backend == "fsspec":
        return {
            "backend": {"name": "fsspec", "url": f"memory://fuzz-{next(_fresh)}", "format": "safetensors"}
        }
    return {"backend": backend, "output_dir": directory}


@pytest.mark.parametrize("backend", ["pt", "safetensors", "fsspec"])
@given(model=models(), steps=st.integers(1, 3))
@cases(30, 400)
def test_whatever_goes_in_comes_back(backend: str, model: Scripted, steps: int) -> None:
    reset(model)
    with tempfile.TemporaryDirectory() as directory:
        with tlcore.capture(model, log_step_ids=[], **places(backend, directory)) as captured:
            marks = [call_counts(model) for _ in range(steps) if model() is not None or True]
        counts = captured.ledger
        assert counts.balanced and counts.stored == counts.captured, counts.reasons
        run = tlcore.open_run(captured.url)
        assert run.state == "complete" and run.verify() == counts.stored == sum(map(len, run.values()))
        assert len(marks) == len(run) == steps
        for number in run:
            compare_step(run.step(number), model, marks[number - 1] if number else {}, marks[number])


def reset(model: Scripted) -> None:
    for module in model.modules():
        if isinstance(module, Scripted):
            module.seen = []


def call_counts(model: Scripted) -> dict[str, int]:
    return {name: len(module.seen) for name, module in model.named_modules() if isinstance(module, Scripted)}


def compare_step(step: Any, model: Scripted, begin: dict[str, int], end: dict[str, int]) -> None:
    """Every call of the step against what the modules saw."""
    left = {name: end[name] - begin.get(name, 0) for name in end}
    for directory in step.calls:
        call = step.call(directory)
        module = model.get_submodule(call.module)
        assert isinstance(module, Scripted)
        args, kwargs, result = module.seen[begin.get(call.module, 0) + call.index]
        assert_same(args, call.inputs.args)
        assert_same(kwargs, call.inputs.kwargs)
        assert_same(result, call.outputs)
        left[call.module] -= 1
    assert not any(left.values()), "calls that were not captured"


@given(value=VALUES, other=VALUES)
@cases(40, 600)
def test_one_call_after_another_keeps_its_own_structure(value: Any, other: Any) -> None:
    """Structures alike in part are never taken for one another."""
    makers: list[Callable[[], Any]] = [
        lambda: value,
        lambda: other,
        lambda: (value, other),
        lambda: [value, other],
    ]
    model = Scripted({"only": Scripted({}, 0)}, 4)
    only = model.get_submodule("only")
    assert isinstance(only, Scripted)
    model.script = [((), {}, None)]
    only.script = [((make(),), {"k": make()}, make()) for make in makers]
    with tempfile.TemporaryDirectory() as directory:
        with tlcore.capture(model, log_step_ids=[], output_dir=directory, backend="safetensors") as captured:
            model()
            model()
        run = tlcore.open_run(captured.url)
        assert run.verify() == captured.ledger.stored == captured.ledger.captured
        for number in (0, 1):
            for index in range(4):
                call = run.step(number).call("only" if not index else f"only_{index}")
                args, kwargs, result = only.script[index]
                assert_same((args, kwargs, result), (*call.inputs, call.outputs))
