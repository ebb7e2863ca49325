"""Tensors of any dtype, shape and strides, stored as int8 with a scale a row: none is silently wrong."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tlcore
from tests.fuzz.settings import cases
from tests.fuzz.test_structures import assert_same, tensors
from tlcore.engine.staging.conversion import converted
from tlcore.layout.row_scale import packed_shape, restored

pytestmark = pytest.mark.slow


class Gives(nn.Module):
    def __init__(self, values: list[torch.Tensor]) -> None:
        super().__init__()
        self.values = values

    def forward(self) -> Any:
        return self.values


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
@given(values=st.lists(tensors(), min_size=1, max_size=6), steps=st.integers(1, 3), both=st.booleans())
@cases(40, 1000)
def test_what_is_packed_is_what_comes_back(
    backend: str, values: list[torch.Tensor], steps: int, both: bool
) -> None:
    keys: dict[str, Any] = {"store_dtype": "int8", "capture": "both" if both else "tensor"}
    module = Gives(values)
    with tempfile.TemporaryDirectory() as directory:
        with tlcore.capture(
            module, output_dir=directory, log_step_ids=[], backend=backend, **keys
        ) as capture:
            for _ in range(steps):
                module()
        assert capture.ledger.balanced and capture.ledger.stored == capture.ledger.captured
        run = tlcore.open_run(capture.url)
        assert run.verify() == capture.ledger.stored
        for number in run.steps:
            for place, value in enumerate(values):
                found = run.tensor(f"step_{number}/_root/outputs_{place}")
                plain = value.detach()
                if packed_shape(plain.dtype, plain.shape) is not None:
                    plain = restored(converted(plain, torch.int8), str(plain.dtype).removeprefix("torch."))
                assert_same(plain, found)
