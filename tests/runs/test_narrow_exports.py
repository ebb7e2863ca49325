"""Exports of runs that store less than the model had: the values that everything reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranked import Rows, requests_run
from tlcore.runs.export.export import export

pytest.importorskip("pyarrow")


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
@pytest.mark.parametrize(("stored", "off"), [("int8", 0.03), ("float8_e4m3fn", 0.25), ("bfloat16", 0.02)])
def test_rows_that_are_stored_narrower_are_exported_as_they_are_read(
    stored: str, off: float, backend: str, tmp_path: Path
) -> None:
    steps: list[Rows] = [[("a-00000000", 3, 0), ("b-00000000", 2, 0)], [("b-00000000", 1, 2)]]
    values = torch.randn(6, 64)

    def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"layer": values[5 * step : 5 * step + sum(row["rows"] for row in rows)]}

    def extra(step: int) -> dict[str, Any]:
        told = [
            {"request_id": name, "prompt": 1, "first_position": first, "ids": list(range(count))}
            for name, count, first in steps[step]
        ]
        return {"tokens": told}

    run = requests_run(tmp_path / "runs", steps, tensors, backend=backend, extra=extra, store_dtype=stored)
    export(run, tmp_path / "out", "requests", ["layer/outputs"])
    for number, (name, own) in enumerate({"a": [0, 1, 2], "b": [3, 4, 5]}.items()):
        file = tmp_path / "out" / "hidden_states" / f"hs_{number}.safetensors"
        states = load_file(file)["hidden_states"][:, 0]
        assert torch.equal(states, run.request(f"{name}-00000000")["layer/outputs_cpu"])
        assert (states.float() - values[own]).abs().max() <= off
