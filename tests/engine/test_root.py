"""The captured model itself: a call like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.reader import Step


class Model(nn.Module):
    """Does something after its last submodule; one of them has the name of the model's own directory."""

    def __init__(self, cap: float = 1.0, again: bool = False) -> None:
        super().__init__()
        self._root, self._root_1, self.cap, self.again = nn.Identity(), nn.Identity(), cap, again

    def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
        if self.again and not depth:
            return self(x, depth=1)  # type: ignore[no-any-return]
        x = self._root_1(self._root(self._root(x)))
        return x * self.cap


def captured(model: nn.Module, path: Path, *args: Any, **keys: Any) -> Step:
    with tlcore.capture(model, output_dir=str(path), **keys) as capture:
        model(*args)
    assert capture.ledger.balanced
    return tlcore.open_run(capture.url).step(0)


X = torch.randn(2, 3)


def test_it_has_a_directory_and_no_name(tmp_path: Path) -> None:
    step = captured(Model(2.0), tmp_path, X)
    assert step.calls == ["_root", "_root~2", "_root~2_1", "_root_1"]
    names = {directory: (step.call(directory).module, step.call(directory).index) for directory in step.calls}
    assert names == {
        "_root": ("", 0),
        "_root~2": ("_root", 0),
        "_root~2_1": ("_root", 1),
        "_root_1": ("_root_1", 0),
    }
    assert torch.equal(step.call("_root").inputs.args[0], X)
    assert torch.equal(step.call("_root").outputs, X * 2)


@pytest.mark.parametrize(("match", "calls"), [("^$", ["_root", "_root_1~2"]), ("^$:1", ["_root_1~2"])])
def test_patterns_and_call_indices_select_it(tmp_path: Path, match: str, calls: list[str]) -> None:
    step = captured(Model(again=True), tmp_path, X, module_call_match=match)
    assert step.calls == calls


def test_its_tensors_are_aliases_where_they_are_stored_anyway(tmp_path: Path) -> None:
    step = captured(Model(1.0), tmp_path, X)
    stored = [record for record in step.records if "alias_of" not in record]
    assert len(step.records) == 8 and len(stored) == 1


@pytest.mark.parametrize("result", [None, 3, "text", {"a": 1}])
def test_any_result_is_described(tmp_path: Path, result: Any) -> None:
    class Odd(nn.Module):
        def forward(self) -> Any:
            return result

    step = captured(Odd(), tmp_path)
    assert step.call("_root").outputs == result and step.call("_root").inputs.args == ()


def test_what_happens_after_the_last_submodule_is_compared(tmp_path: Path) -> None:
    for cap in (1.0, 2.0):
        captured(Model(cap), tmp_path / str(cap), X)
    a, b = (next((tmp_path / str(cap)).iterdir()) for cap in (1.0, 2.0))
    found = tlcore.compare(str(a), str(b))
    first = found.first_divergence
    assert not found.equal and first is not None
    assert (first.module, first.direction, first.born) == ("", "outputs", True)
    assert str(first) == "_root, outputs of step 0; born here: its inputs agree"


def test_what_hooks_of_others_change_is_what_counts(tmp_path: Path) -> None:
    model = Model()
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with tlcore.capture(model, output_dir=str(tmp_path), log_step_ids=[], module_call_match="^$") as capture:
        model.register_forward_hook(lambda module, args, output: output + 10)
        model(X)
        model.register_forward_pre_hook(lambda module, args: (args[0] + 5,))
        model(X)
        model(X)
    run = tlcore.open_run(capture.url)
    given = [run.tensor(f"step_{step}/_root/inputs_0_cpu") for step in range(3)]
    gave = [run.tensor(f"step_{step}/_root/outputs_cpu") for step in range(3)]
    assert torch.equal(given[0], X + 1) and torch.equal(gave[0], X + 1 + 10)
    assert torch.equal(given[1], X + 1 + 5) and torch.equal(gave[1], X + 1 + 5 + 10)
    assert torch.equal(given[2], X + 1 + 5) and torch.equal(gave[2], X + 1 + 5 + 10)
