"""Arguments and results of every shape: what is captured, named and described."""

from __future__ import annotations

import collections
import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.sinks import MemorySink


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: Any


Point = collections.namedtuple("Point", ["x", "y"])


class Returns(nn.Module):
    """Returns what it is told to, so that any structure can be put into a forward pass."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.make()


class Root(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.child(*args, **kwargs)


def run(make: Callable[[], Any], *args: Any, **kwargs: Any) -> tuple[MemorySink, dict[str, Any]]:
    sink = MemorySink()
    with tlcore.capture(Root(Returns(make)), backend=sink) as captured:
        Root.__call__(captured._model, *args, **kwargs)
    assert captured.ledger.balanced
    structures = json.loads(json.dumps(dict(sink.steps[0].structures)))
    return sink, structures


def stems(sink: MemorySink, direction: str = "outputs") -> set[str]:
    return {name.rsplit("/", 1)[1] for name in sink.tensors if f"/{direction}" in name}


T = torch.ones(2)

NESTED: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "tensor": (lambda: T, {"outputs_cpu"}),
    "tuple with None": (lambda: (T, None), {"outputs_0_cpu"}),
    "list": (lambda: [T, T + 1], {"outputs_0_cpu", "outputs_1_cpu"}),
    "nested": (
        lambda: {"a": (T, [T + 1]), "b": T},
        {"outputs_a_0_cpu", "outputs_a_1_0_cpu", "outputs_b_cpu"},
    ),
    "dataclass": (lambda: Pair(T, {"k": T}), {"outputs_first_cpu", "outputs_second_k_cpu"}),
    "named tuple": (lambda: Point(T, 3), {"outputs_0_cpu"}),
    "collision": (lambda: {"a_b": T, "a": {"b": T + 1}}, {"outputs_a_b_cpu", "outputs_a_b_cpu~2"}),
    "hostile key": (lambda: {"../../x": T}, {"outputs_..%2F..%2Fx_cpu"}),
    "nothing": (lambda: None, set()),
    "scalars": (lambda: (1, 2.5, "s", True), set()),
}


@pytest.mark.parametrize("kind", NESTED)
def test_every_tensor_of_a_structure_is_captured_under_its_path(kind: str) -> None:
    make, expected = NESTED[kind]
    sink, _ = run(make)
    assert stems(sink) == expected


def test_a_model_output_is_a_mapping() -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput

    sink, structures = run(lambda: BaseModelOutput(last_hidden_state=T, hidden_states=(T, T + 1)))
    assert stems(sink) == {
        "outputs_last_hidden_state_cpu",
        "outputs_hidden_states_0_cpu",
        "outputs_hidden_states_1_cpu",
    }
    assert structures["child/outputs.json"]["class"].endswith("BaseModelOutput")


def test_collisions_are_told_apart_by_the_structure() -> None:
    sink, structures = run(lambda: {"a_b": T, "a": {"b": T + 1}})
    items = structures["child/outputs.json"]["items"]
    for node, value in ((items["a_b"], 1.0), (items["a"]["items"]["b"], 2.0)):
        assert sink.tensors[node["file"].removesuffix(".pt")][0] == value


def test_arguments_are_kept_apart_from_keywords() -> None:
    sink, structures = run(lambda: None, T, None, hidden_states=T + 1, flag=True)
    assert stems(sink, "inputs") == {"inputs_0_cpu", "inputs_hidden_states_cpu"}
    document = structures["child/inputs.json"]
    assert document["type"] == "tuple" and document["items"][1] == {"type": "none"}
    assert document["kwargs"]["items"]["flag"] == {"type": "bool", "value": True}


def test_the_structure_describes_scalars_and_unknown_objects() -> None:
    _, structures = run(lambda: [1, 2.5, float("nan"), "text", object(), Point(1, 2)])
    items = structures["child/outputs.json"]["items"]
    assert items[:4] == [
        {"type": "int", "value": 1},
        {"type": "float", "value": 2.5},
        {"type": "float", "value": "nan"},
        {"type": "str", "value": "text"},
    ]
    assert items[4] == {"type": "object", "class": "builtins.object"}
    assert items[5]["fields"] == ["x", "y"]


def test_keys_that_json_cannot_tell_apart_stay_apart() -> None:
    _, structures = run(lambda: {1: T, "1": T + 1})
    assert set(structures["child/outputs.json"]["items"]) == {"1", "1~2"}


def test_a_list_that_contains_itself_ends() -> None:
    endless: list[Any] = [T]
    endless.append(endless)
    sink, structures = run(lambda: endless)
    assert stems(sink) == {"outputs_0_cpu"}
    assert structures["child/outputs.json"]["items"][1] == {"type": "object", "class": "cycle"}


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "expanded": lambda: torch.ones(3).expand(2, 3),
    "zero-size": lambda: torch.empty(0, 3),
    "zero-dimensional": lambda: torch.tensor(3.0),
    "complex conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "complex128": lambda: torch.tensor([1j], dtype=torch.complex128),
    "float8": lambda: torch.ones(3).to(torch.float8_e5m2),
    "bool": lambda: torch.tensor([True]),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_of_any_kind_is_stored_bit_for_bit(kind: str) -> None:
    tensor = ODD[kind]()
    sink, _ = run(lambda: tensor)
    stored = sink.tensors["step_0/child/outputs_cpu"]
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    assert stored.dtype == plain.dtype and stored.shape == plain.shape
    assert torch.equal(stored.flatten().view(torch.uint8), plain.flatten().view(torch.uint8))


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


def sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


UNSUPPORTED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "unsupported layout torch.sparse_coo"),
    "sparse csr": (sparse_csr, "unsupported layout torch.sparse_csr"),
    "quantized": (quantized, "unsupported quantized dtype"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta tensor holds no data"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_tensor_without_plain_bytes_is_described_as_skipped(kind: str) -> None:
    make, reason = UNSUPPORTED[kind]
    sink, structures = run(make)
    assert sink.tensors == {}
    assert structures["child/outputs.json"]["skipped"] == reason
    counts = sink.steps[0].counts
    # Once as the child's result and once as the model's.
    assert counts.skipped == counts.captured == 2
    assert counts.reasons == {f"skipped: {reason}": 2}
