"""A captured call again, of which the run has not all, or not as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.analysis.replay.layers import made

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def captured(tmp_path: Path, model: nn.Module, **keys: Any) -> str:
    with tlcore.capture(model, output_dir=str(tmp_path), **keys) as capture, torch.no_grad():
        model(X)
    return str(capture.url)


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(tuple(range(x.dim() - 1)))


@pytest.mark.parametrize("keys", [{"rows": "last"}, {"request_ids": ["^0$"]}, {"sample_rate": 0.1}])
def test_what_relates_rows_is_told_that_the_run_has_only_some(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = nn.Sequential(_Mean(), nn.Flatten(0, 1))
    with (
        tlcore.capture(model, output_dir=str(tmp_path), **keys) as capture,
        capture.step(rows=["0", "1", "2"]),
    ):
        model(X)
    [key] = keys
    found = tlcore.replay(capture.url, "step_0/0", model[0])
    assert not found.equal and f"the run has chosen rows alone ({key}: " in str(found)

    def refuses(x: torch.Tensor) -> torch.Tensor:
        return x.view(X.shape)

    with pytest.raises(tlcore.ReadError, match=rf"chosen rows alone \({key}: .*RuntimeError"):
        tlcore.replay(capture.url, "step_0/0", refuses)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_was_stored_in_another_dtype_is_told_as_that(tmp_path: Path, dtype: str) -> None:
    model = made()
    url = captured(tmp_path, model, store_dtype=dtype)
    text = str(tlcore.replay(url, "step_0/first", model.get_submodule("first")))
    assert f'rounded to {dtype}, as "store_dtype" asked' in text and "autocast" not in text


def test_a_result_that_was_not_stored_is_not_said_to_differ(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 400))
    url = captured(tmp_path, model, max_tensor_size=200)
    found = tlcore.replay(url, "step_0/1", model[1])
    assert not found.equal
    assert "cannot be compared, it was not stored (larger than max_tensor_size)" in str(found)
