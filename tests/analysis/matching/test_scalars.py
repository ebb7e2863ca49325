"""Values that are no tensors: a note says where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main


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
    keys = {"backend": "safetensors", "log_step_ids": [], **keys}
    model = Model(given, returned)
    with tlcore.capture(model, output_dir=str(tmp_path), **{"module_call_match": ".", **keys}) as captured:
        for _ in range(2):
            model(torch.ones(3))
    return captured.url


def test_the_first_is_named_and_they_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path, {"scale": 1.0, "cache": None}, {"kind": "x" * 50, "list": [1, 2]})
    b = run(tmp_path, {"scale": 2.0, "mask": torch.ones(1)}, {"kind": "x" * 50 + "y", "list": [1]})
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


def test_equal_values_and_structures_that_lie_in_files_give_no_note(tmp_path: Path) -> None:
    values = {"scale": float("nan"), "name": "one", "none": None, "empty": []}
    for keys in ({}, {"capture": "both"}):
        a, b = (run(tmp_path, values, values, **keys) for _ in range(2))
        assert tlcore.compare(a, b).notes == []
    plain, other = (run(tmp_path, values, value, backend="pt") for value in (1, 2))
    assert tlcore.compare(plain, other).notes == []
