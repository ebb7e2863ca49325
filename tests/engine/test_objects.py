"""Tensors inside objects: stored under their path as of the call, or counted as skipped with a reason."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import dataclasses
import functools
import operator
import queue
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

import tlcore
from tlcore.hotpath.held_tensors import is_of_tensors
from tlcore.hotpath.objects import MOST_VALUES
from tlcore.ledger import Counts
from tlcore.reader import Step

T = torch.arange(3.0)


class Gives(nn.Module):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.make()


class Root(nn.Module):
    def __init__(self, make: Callable[[], Any], spoil: Callable[[Any], None] = lambda _: None) -> None:
        super().__init__()
        self.child, self.spoil = Gives(make), spoil

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.spoil(self.child(*args, **kwargs))


Run = Callable[..., tuple[Counts, dict[str, torch.Tensor], Any, Step]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def capture(model: Root, *args: Any, **keys: Any) -> tuple[Counts, dict[str, torch.Tensor], Any, Step]:
        with tlcore.capture(model, output_dir=str(tmp_path), module_call_match="child", **keys) as captured:
            model(*args)
        assert captured.ledger.balanced
        step = tlcore.open_run(captured.url).step(0)
        begin = "step_0/child/outputs_"
        found = {name.removeprefix(begin): step[name] for name in step if name.startswith(begin)}
        return captured.ledger, found, step.call("child").outputs, step

    return capture


class Guarded:
    """Holds a tensor; whoever runs its code, and does not just look, is found out."""

    def __init__(self) -> None:
        object.__getattribute__(self, "__dict__")["held"] = T

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(f"asked for {name}")

    @property
    def costly(self) -> Any:
        raise SystemExit("ran a property")


class Slots:
    __slots__ = ("__private", "unset", "value")

    def __init__(self) -> None:
        self.value, self.__private = T, T + 1


class Ring:
    def __init__(self) -> None:
        self.me, self.held = self, [T, (1, T + 1)]
        self.note = "not about tensors"


class Scored(list[Any]):
    pass


def scored() -> Scored:
    found = Scored([T])
    found.scores = T + 1  # type: ignore[attr-defined]
    return found


@dataclasses.dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = None


class Text(str):
    pass


class Raw(bytes):
    pass


def marked(value: Any) -> Any:
    value.held = T
    return value


def in_context(value: Any) -> Any:
    variable = contextvars.ContextVar[Any]("variable")
    variable.set(value)
    return variable


def with_defaults(value: torch.Tensor) -> Any:
    def inner(plain: int, one: torch.Tensor = value, *, two: torch.Tensor = value + 1) -> None:
        raise AssertionError

    return inner


def closed_over(value: Any) -> Callable[[], Any]:
    return lambda: value


OBJECTS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "attributes": (lambda: types.SimpleNamespace(a=T, b=3), {"a_cpu": T}),
    "no code of the class runs": (Guarded, {"held_cpu": T}),
    "slots": (Slots, {"value_cpu": T, "_Slots__private_cpu": T + 1}),
    "a cycle": (Ring, {"held_0_cpu": T, "held_1_1_cpu": T + 1}),
    "a list's attributes": (scored, {"0_cpu": T, "scores_cpu": T + 1}),
    "a text's attributes": (lambda: marked(Text("a")), {"held_cpu": T}),
    "bytes' attributes": (lambda: marked(Raw(b"a")), {"held_cpu": T}),
    "a context's variable": (lambda: in_context([T]), {"value_0_cpu": T}),
    "dataclasses": (lambda: Pair(T, Pair(T + 1)), {"first_cpu": T, "second_first_cpu": T + 1}),
    "a deque": (lambda: collections.deque([T, T + 1]), {"0_cpu": T, "1_cpu": T + 1}),
    "a set by content": (lambda: {T + 5, T, T + 1}, {"0_cpu": T, "1_cpu": T + 1, "2_cpu": T + 5}),
    "views": (lambda: {"a": T}.values(), {"0_cpu": T}),
    "a mapping proxy": (lambda: types.MappingProxyType({"k": T}), {"k_cpu": T}),
    "a user's dictionary": (lambda: collections.UserDict(k=T), {"k_cpu": T}),
    "a tensor as a key": (lambda: {T: T + 1}, {"Tensor_0.key_cpu": T, "Tensor_0_cpu": T + 1}),
    "a slice": (lambda: slice(T, None), {"start_cpu": T}),
    "a partial": (lambda: functools.partial(print, T, k=T + 1), {"args_0_cpu": T, "keywords_k_cpu": T + 1}),
    "a closure": (lambda: closed_over(T), {"value_cpu": T}),
    "default arguments": (lambda: with_defaults(T), {"one_cpu": T, "two_cpu": T + 1}),
    "numpy": (lambda: {"a": T.numpy()}, {"a_cpu": T}),
    "numpy backwards": (lambda: [T.numpy()[::-1]], {"0_cpu": T.flip(0)}),
    "numpy of the other byte order": (lambda: [T.numpy().astype(">f4")], {"0_cpu": T}),
    "numpy objects": (lambda: np.array([None, T], dtype=object), {"1_cpu": T}),
    "numpy records": (
        lambda: np.array([(1.0, 2)], dtype=[("x", "f4"), ("y", "i8")]),
        {"x_cpu": torch.tensor([1.0]), "y_cpu": torch.tensor([2])},
    ),
    "numpy masked": (
        lambda: np.ma.masked_array([1.0, 2.0], mask=[False, True]),  # type: ignore[no-untyped-call]
        {
            "data_cpu": torch.tensor([1.0, 2.0], dtype=torch.float64),
            "_mask_cpu": torch.tensor([False, True]),
        },
    ),
    "a distribution": (lambda: torch.distributions.Normal(T, T + 1), {"loc_cpu": T, "scale_cpu": T + 1}),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_tensor_is_stored_under_its_path(run: Run, kind: str) -> None:
    make, expected = OBJECTS[kind]
    ledger, found, _, _ = run(Root(make))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert ledger.captured == ledger.stored == len(expected)


def test_the_structure_says_what_the_objects_are(run: Run) -> None:
    _, _, outputs, _ = run(Root(lambda: Pair(types.SimpleNamespace(a=T, b=3), T.numpy())))
    assert outputs["first"].class_name == "types.SimpleNamespace"
    assert torch.equal(outputs["first"].a, T) and torch.equal(outputs["first"]["a"], T)
    with pytest.raises(AttributeError, match="nothing of the name 'b' was stored"):
        _ = outputs["first"].b
    assert torch.equal(outputs["second"], T)


def test_a_text_with_attributes_is_still_a_text(run: Run) -> None:
    _, _, outputs, _ = run(Root(lambda: [Text("a"), marked(Text("b"))]))
    assert outputs[0] == "a" and outputs[1]["value"] == "b"


def test_values_are_those_of_the_call(run: Run) -> None:
    def spoil(value: Any) -> None:
        value.held.fill_(-1)
        value.held = T + 7
        value.more = T + 8

    _, found, _, _ = run(Root(lambda: types.SimpleNamespace(held=T.clone()), spoil))
    assert found.keys() == {"held_cpu"} and torch.equal(found["held_cpu"], T)


class Raises(collections.abc.Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise ValueError(key)

    def __iter__(self) -> Any:
        raise ValueError("no")

    def __len__(self) -> int:
        return 1


def nested(depth: int) -> Any:
    value: Any = T
    for _ in range(depth):
        value = types.SimpleNamespace(inner=value)
    return value


def _resolved() -> Any:
    future = torch.futures.Future[torch.Tensor]()
    future.set_result(T)
    return future


def _awaited() -> Any:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.set_result(T)
    loop.close()
    return future


def _put(queue: Any) -> Any:
    queue.put(T)
    return queue


SKIPPED: dict[str, tuple[Callable[[], Any], str, int]] = {
    "a generator": (lambda: (each for each in [T]), "iterator", 1),
    "a list's iterator": (lambda: iter([T]), "iterator", 1),
    "a tensor's storage": (T.untyped_storage, "storage", 1),
    "a future": (_resolved, "future", 1),
    "a future of asyncio": (_awaited, "hidden by its class", 1),
    "an exception": (lambda: ValueError("no", T), "hidden by its class", 1),
    "a cell": (lambda: types.CellType(T), "hidden by its class", 1),
    "a queue of C": (lambda: _put(queue.SimpleQueue()), "hidden by its class", 1),
    "a call that is kept": (lambda: operator.methodcaller("add", [T]), "hidden by its class", 1),
    "a table": (lambda: pandas.DataFrame({"a": [1.0, 2.0]}), "hidden by its class", 1),
    "a method of a tensor": (lambda: T.add, "method", 1),
    "a method of what holds one": (lambda: Pair(T, T).__repr__, "method", 1),
    "a module": (lambda: nn.Linear(2, 2), "module", 2),
    "text in numpy": (lambda: np.array(["a"]), "unsupported numpy dtype <U1", 1),
    "what raises": (Raises, "looking into it raised ValueError", 1),
    "beyond all depth": (lambda: nested(70), "nested too deep", 1),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_what_is_not_looked_into_is_counted_and_said(run: Run, kind: str) -> None:
    make, reason, count = SKIPPED[kind]
    ledger, found, outputs, _ = run(Root(make))
    assert found == {} and ledger.captured == ledger.skipped == count
    assert ledger.reasons == {f"skipped: {reason}": count}
    while outputs.items:
        (outputs,) = outputs.items.values()
    assert outputs.skipped == reason


def test_an_iterator_is_not_consumed(run: Run) -> None:
    left: list[Any] = []
    run(Root(lambda: (each for each in [T, T]), lambda value: left.extend(value)))
    assert len(left) == 2


def test_objects_without_tensors_are_only_named(run: Run) -> None:
    names = {"types.SimpleNamespace": types.SimpleNamespace(key="secret"), "builtins.object": object()}
    names |= {"builtins.method": nn.Linear(2, 2).forward, "builtins.builtin_function_or_method": torch.relu}
    ledger, _, outputs, _ = run(Root(lambda: [*names.values(), T.shape]))
    assert ledger.captured == 0
    assert [each.class_name for each in outputs[:-1]] == list(names)
    assert outputs[0].items == {}


class Caches(nn.Module):
    """Two layers that keep keys in a cache, each in place or not, and a model that returns the cache."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache
        self.layers = nn.ModuleList([Layer(i) for i in range(2)])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, cache=self.cache)
        return {"x": x, "cache": self.cache}


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        keys, _ = cache.update(x, x + 1, self.index)
        result: torch.Tensor = x + keys.mean()
        return result


def dynamic() -> Any:
    return pytest.importorskip("transformers").DynamicCache()


def static() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2
    )
    return transformers.StaticCache(config=config, max_cache_len=8)


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("inference", [True, False])
def test_a_cache_is_skipped_once_a_step_or_stored_with_all_its_values(
    tmp_path: Path, make: Callable[[], Any], inference: bool
) -> None:
    x = torch.randn(1, 2, 3, 4)
    with torch.inference_mode(inference), torch.no_grad():
        model = Caches(make())
        with tlcore.capture(model, output_dir=str(tmp_path)) as plain:
            model(x)
        # A static cache also keeps a length in each layer.
        assert plain.ledger.reasons in ({"skipped: cache": 4}, {"skipped: cache": 6})
        assert plain.ledger.balanced
        before = [t.clone() for layer in model.cache.layers for t in (layer.keys, layer.values)]
        with tlcore.capture(model, output_dir=str(tmp_path), capture_objects=["cache"]) as captured:
            model(x + 1)
        after = [t.clone() for layer in model.cache.layers for t in (layer.keys, layer.values)]
    assert captured.ledger.balanced and not captured.ledger.skipped
    step = tlcore.open_run(captured.url).step(0)
    for tensor in (*before, *after):
        same = [name for name in step if step[name].shape == tensor.shape and torch.equal(step[name], tensor)]
        assert any("cache_layers_" in name for name in same)


def test_a_module_that_hands_on_its_own_forward_shows_nothing_of_the_capture(run: Run) -> None:
    root: Root = Root(lambda: [root.child.forward, T])
    ledger, found, _, _ = run(root)
    assert ledger.captured == 1 and len(found) == 1


class Unlooked:
    """Its own code, which says what is in it, raises."""

    __slots__ = ()


class Holder:
    def __init__(self, *held: Any) -> None:
        self.held = held

    def method(self) -> None: ...


def test_a_method_of_what_cannot_be_looked_into_is_counted_and_said(run: Run) -> None:
    def flatten(value: Any) -> Any:
        raise RuntimeError("no")

    register_pytree_node(Unlooked, flatten, lambda children, context: Unlooked())
    holder = Holder(Unlooked())
    counts, found, _, _ = run(Root(lambda: (T, holder.method)))
    assert list(found) == ["0_cpu"]
    assert counts.reasons == {"skipped: looking into it raised RuntimeError": 1}


def test_a_method_of_much_else_is_looked_at_no_further_than_anything(run: Run) -> None:
    # The search goes from the end: what lies before very much is not come upon.
    holder = Holder(T, *[Holder() for _ in range(2 * MOST_VALUES)])
    assert not is_of_tensors(holder.method) and is_of_tensors(Holder(Holder(), T).method)
    counts, found, _, _ = run(Root(lambda: (T, holder.method)))
    assert list(found) == ["0_cpu"] and not counts.skipped
