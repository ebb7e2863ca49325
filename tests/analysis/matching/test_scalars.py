"""Values that are no tensors: a note says where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.analysis.matching import scalars


class Says(nn.Module):
    """Returns its argument beside values that are no tensors."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor, **values: Any) -> Any:
        return x, self.values


class Model(nn.Module):
    def __init__(self, given: dict[str, Any], returned: Any) -> None:
        super().__init__()
        self.one, self.two, self.given = Says(None), Says(returned), given

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.one(x, **self.given)[0])


def run(tmp_path: Path, given: dict[str, Any], returned: Any, **keys: Any) -> str:
    keys = {"log_step_ids": [], **keys}
    model = Model(given, returned)
    keys = {"output_dir": str(tmp_path), "module_call_match": ".", **keys}
    with tlcore.capture(model, **keys) as captured:
        for _ in range(2):
            model(torch.ones(3))
    return captured.url


@pytest.mark.parametrize("backends", [("pt", "pt"), ("safetensors", "safetensors"), ("pt", "safetensors")])
def test_the_first_is_named_and_they_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backends: tuple[str, str]
) -> None:
    first, second = ({"backend": each} for each in backends)
    a = run(tmp_path, {"scale": 1.0, "cache": None}, {"kind": "x" * 50, "list": [1, 2]}, **first)
    mask = {"scale": 2.0, "mask": torch.ones(1)}
    b = run(tmp_path, mask, {"kind": "x" * 50 + "y", "list": [1]}, **second)
    found = tlcore.compare(a, b, ignore_missing=True)
    assert found.equal
    said = "values that are no tensors differ in 8 places, first in one, inputs[scale] of step 0"
    assert found.notes[0] == f"{said}: 1.0 against 2.0"
    limited = tlcore.compare(a, b, modules="two", steps=[1]).notes
    shown = f"{repr('x' * 50)[:40]}..."
    assert limited == [
        "values that are no tensors differ in 2 places, first in two, outputs[1][kind] of step 1:"
        f" {shown} against {shown}"
    ]
    assert main(["compare", a, b, "--ignore-missing"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_equal_values_give_no_note(tmp_path: Path, backend: str) -> None:
    values = {"scale": float("nan"), "name": "one", "none": None, "empty": []}
    for keys in ({}, {"capture": "both"}):
        a, b = (run(tmp_path, values, values, backend=backend, **keys) for _ in range(2))
        assert tlcore.compare(a, b).notes == []


def test_values_in_files_of_another_place_are_not_fetched_one_by_one(tmp_path: Path) -> None:
    urls = [run(tmp_path, {}, value, output_dir=f"memory://{tmp_path.name}") for value in (1, 2)]
    assert tlcore.compare(*urls).notes == []


def test_no_more_files_are_read_than_are_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [run(tmp_path, {}, value, backend="pt") for value in (1, 2)]
    (all_of_them,) = tlcore.compare(*urls).notes
    assert "differ in 2 places" in all_of_them
    # A step has the inputs and the results of two modules.
    monkeypatch.setattr(scalars, "MOST_FILES", 8)
    first, left_out = tlcore.compare(*urls).notes
    assert "differ in one place" in first
    assert left_out == "values that are no tensors were compared before step 1 alone"
