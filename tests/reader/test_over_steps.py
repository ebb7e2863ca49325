"""One tensor of every step as one: `run.tensor` with a name that leaves out the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.errors import MissingError, ReadError

BACKENDS = [
    "pt",
    {"name": "safetensors", "segment_bytes": 600},
    {"name": "safetensors"},
    {"name": "safetensors", "layout": 1},
]


class Varied(nn.Module):
    """Rows in other numbers each step, a constant, a number, and every second step one more module's."""

    def __init__(self) -> None:
        super().__init__()
        self.every, self.fixed, self.number, self.second = (nn.Identity() for _ in range(4))

    def forward(self, step: int) -> torch.Tensor:
        x: torch.Tensor = self.every(rows_of(step))
        self.fixed(torch.arange(6.0).reshape(2, 3))
        self.number(torch.tensor(step))
        if step % 2:
            self.second(x + 1)
        return x


def rows_of(step: int) -> torch.Tensor:
    return torch.full((1 + step % 3, 4), step, dtype=torch.bfloat16) + torch.arange(4)


def captured(tmp_path: Path, backend: Any, steps: int = 9, **keys: Any) -> tlcore.Run:
    model = Varied()
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, log_step_ids=[], **keys) as running:
        for step in range(steps):
            model(step)
    return tlcore.open_run(running.url)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_all_steps_one_after_the_other(backend: Any, tmp_path: Path) -> None:
    run = captured(tmp_path, backend)
    expected = torch.cat([rows_of(step) for step in range(9)])
    for name in ("every/outputs_cpu", "every/outputs", "every/inputs_0_cpu"):
        found = run.tensor(name)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.equal(run.tensor("fixed/outputs"), torch.arange(6.0).reshape(2, 3).repeat(9, 1))
    assert torch.equal(run.tensor("number/outputs"), torch.arange(9))
    odd = torch.cat([rows_of(step) + 1 for step in range(1, 9, 2)])
    assert torch.equal(run.tensor("second/outputs"), odd)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_joined_is_said(backend: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, log_step_ids=[]) as running:
        for x in (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3)):
            model(x)
    run = tlcore.open_run(running.url)
    with pytest.raises(ReadError, match=r"different forms .*read it step by step, as step_<S>/0/outputs_cpu"):
        run.tensor("0/outputs_cpu")
    with pytest.raises(MissingError, match="no tensor 'step_0/0/output'"):
        run.tensor("0/output")
    with pytest.raises(ReadError, match="unshard takes the tensor of one step"):
        run.tensor("0/outputs_cpu", unshard=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_and_rows_of_numbers_are_not_mixed(backend: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, log_step_ids=[]) as running:
        for x in (torch.tensor(1.0), torch.ones(2), torch.tensor(3.0)):
            model(x)
    with pytest.raises(ReadError, match="different forms"):
        tlcore.open_run(running.url).tensor("0/outputs_cpu")


def test_a_damaged_segment_is_said(tmp_path: Path) -> None:
    run = captured(tmp_path, {"name": "safetensors"})
    (file,) = Path(run.url).rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ReadError, match="ends too early"):
        tlcore.open_run(run.url).tensor("every/outputs")
