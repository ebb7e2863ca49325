"""Comparing runs with operators: the operator and the line in which a difference is born."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tlcore
from tests.engine.samples import PROMPTS, llama, run_of
from tlcore.analysis.report.text import verdict
from tlcore.analysis.results import Comparison

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(11))


class Mixer(nn.Module):
    """``fault`` is what goes wrong in one run: "scale" (a constant), "weight", "order" or "extra"."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fault = fault
        self.gate, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        if fault == "weight":
            with torch.no_grad():
                self.gate.weight[0] += 0.5

    def forward(self, x: torch.Tensor) -> Any:
        h = functional.silu(self.gate(x))
        scale = 2.5 if self.fault == "scale" else 2.0
        h = h * scale
        if self.fault == "extra":
            h = h.abs()
        h = h.clamp(-1, 1)
        return self.down(h)


def run(tmp_path: Path, fault: str = "", **keys: Any) -> str:
    torch.manual_seed(4)
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, Mixer(fault))
    with tlcore.capture(model, output_dir=str(tmp_path), **keys) as capture, torch.no_grad():
        model(X)
    return str(capture.url)


def compared(tmp_path: Path, fault: str, ops: tuple[str, ...] = (r"^1\b",), **keys: Any) -> Comparison:
    return tlcore.compare(run(tmp_path, ops=list(ops), **keys), run(tmp_path, fault, ops=list(ops), **keys))


def line(text: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"{__file__}:{next(n for n, each in enumerate(lines, 1) if each.strip() == text)}"


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_difference_is_born_in_an_operator_at_its_line(tmp_path: Path, backend: str) -> None:
    found = compared(tmp_path, "scale", backend=backend)
    first = found.first_divergence
    assert first is not None and first.born is True and first.operator is not None
    assert (first.module, first.direction) == ("1", "op.0001.mul")
    assert str(first).endswith(f"born in mul at {line('h = h * scale')}: its inputs agree")
    assert first.to_json()["operator"]["b"]["function"] == "torch.Tensor.mul"
    assert found.advice is None


class InPlace(nn.Module):
    """Its second part, and code of which no operator is heard, work in place; ``faults`` are wrong there."""

    def __init__(self, *faults: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.faults = faults
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        h += 2.0 if "between" in self.faults else 1.0
        return self.second(h)


class Within(InPlace):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        h.mul_(2.5 if "within" in self.faults else 2.0)
        return self.second(h)


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_what_works_in_place_is_told_like_any_other(tmp_path: Path, around: Any) -> None:
    def first(make: type[InPlace], fault: str, ops: str) -> Any:
        urls = []
        for model in (nn.Sequential(make()), nn.Sequential(make(fault))):
            with around(), tlcore.capture(model, output_dir=str(tmp_path), ops=[ops]) as capture:
                model(X)
            urls.append(str(capture.url))
        return tlcore.compare(*urls).first_divergence

    found = first(Within, "within", "^0$")
    assert (found.module, found.direction, found.born) == ("0", "op.0000.mul_", True)
    # What was changed where nobody heard it is no fault of the operator that is given it.
    found = first(InPlace, "between", r"^0\.")
    assert found.within == "0" and found.operator is None


def test_without_operators_the_verdict_says_what_would_show_them(tmp_path: Path) -> None:
    found = compared(tmp_path, "scale", ops=())
    assert found.first_divergence is not None and found.first_divergence.within == "1"
    text = "\n".join(verdict(found))
    assert found.advice is not None and found.advice in text
    assert '"ops": ["^1$"]' in found.advice
    again = compared(tmp_path, "scale", ops=("^1$",)).first_divergence
    assert again is not None and again.direction == "op.0001.mul" and again.born is not False


def test_a_weight_is_named_by_the_operator_that_uses_it(tmp_path: Path) -> None:
    first = compared(tmp_path, "weight").first_divergence
    assert first is not None and first.operator is not None and first.operator.a is not None
    assert (first.module, first.direction, first.born) == ("1.gate", "op.0000.linear", True)
    assert first.operator.a.inputs[1] == {"parameter": "1.gate.weight"}


def test_an_input_from_elsewhere_is_not_called_equal(tmp_path: Path) -> None:
    # What the submodule gives is not captured, so that nobody knows of it.
    keys: dict[str, Any] = {"module_call_match": "^0$", "ops": [r"^1$"]}
    first = tlcore.compare(run(tmp_path, **keys), run(tmp_path, "weight", **keys)).first_divergence
    assert first is not None and first.direction == "op.0000.silu"
    assert first.born is None and "not all of whose inputs were compared" in str(first)


def test_other_operators_are_told_from_the_first_on(tmp_path: Path) -> None:
    found = compared(tmp_path, "extra")
    note = next(each for each in found.notes if "other operators" in each)
    assert note.startswith("the code of 1 uses other operators from op.0002.")
    assert f"A uses none there, B uses abs at {line('h = h.abs()')}" in note
    first = found.first_divergence
    assert first is not None and first.direction == "op.0002.clamp" and first.born
    assert str(first).endswith(f"A uses none there, B uses abs at {line('h = h.abs()')}")


def test_what_has_no_rows_of_its_own_has_inputs_of_every_request(tmp_path: Path) -> None:
    # As many tokens as heads: whose rows the attention of all heads has cannot be told.
    model, ids = llama(), torch.tensor([PROMPTS[0][:4]])
    inside: dict[str, Any] = {"ops": [r"^model\.layers\.1\b"]}
    right = run_of(model, tmp_path, lambda _: model(ids), **inside)
    model.model.layers[1].self_attn.scaling = 1.0
    first = tlcore.compare(right, run_of(model, tmp_path, lambda _: model(ids), **inside)).first_divergence
    assert first is not None and first.operator is not None and first.operator.a is not None
    assert first.operator.a.name == "scaled_dot_product_attention" and first.born is True


def test_equal_runs_have_no_advice(tmp_path: Path) -> None:
    found = compared(tmp_path, "")
    assert found.equal and found.advice is None and not any("other operators" in each for each in found.notes)


@pytest.mark.parametrize(
    "damage",
    [
        {"operator": None},
        {"operator": {"name": "mul", "function": "torch.mul", "file": "f.py", "line": 0, "inputs": []}},
        {
            "operator": {
                "name": "mul",
                "function": "torch.mul",
                "file": "f.py",
                "line": 3,
                "inputs": [{"x": 1}],
            }
        },
        {"operator": {"name": "mul", "function": 5, "file": "f.py", "line": 3, "inputs": []}},
    ],
    ids=["none", "line", "input", "function"],
)
def test_a_damaged_operator_is_an_error_and_no_verdict(tmp_path: Path, damage: dict[str, Any]) -> None:
    a, b = run(tmp_path, ops=["^1$"]), run(tmp_path, "scale", ops=["^1$"])
    for url in (a, b):
        file = Path(url) / "step_0" / "1" / "op.0001.mul.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(tlcore.ReadError, match="damaged"):
        tlcore.open_run(a).step(0).call("1").operators  # noqa: B018
    first = tlcore.compare(a, b).first_divergence
    assert first is not None and first.direction == "op.0001.mul" and first.born is None
