"""What `tlcore explain` says where it names no operator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.adapters.explain import Explanation, Maker

X = torch.ones(2, 3)


@torch.jit.script
def _multiplied(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x * scale


class Kernel(nn.Module):
    """Computes by what no mode of PyTorch hears."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _multiplied(x, self.scale)
        return found


class Beside(Kernel):
    """Its operators agree; what differs is written into a result of theirs by something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x + 1
        memory: Any = (ctypes.c_float * made.numel()).from_address(made.data_ptr())
        memory[0] = self.scale
        return made


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x * 2)
        return found


def explanation(
    tmp_path: Path, make: Callable[[float], nn.Module], other: float = 1.0, **keys: Any
) -> Explanation:
    urls = []
    for scale, by in ((2.0, 1.0), (3.0, other)):
        model = Model(make(scale))
        with (
            torch.no_grad(),
            tlcore.capture(model, output_dir=str(tmp_path), ops=["inner"], **keys) as capture,
        ):
            model(X * by)
        urls.append(capture.url)
    compared = tlcore.compare(*urls)
    return Explanation(compared, [compared], (Maker("a", "vllm"), Maker("b", "vllm")))


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    [
        (Kernel, {}, "the code of inner calls no function of torch by which it could be heard"),
        (Beside, {}, "all operators that its code uses agree as far as they were compared: inner computes"),
        (Kernel, {"module_call_match": ["^$"]}, 'capture both again with "ops": ["^$"]'),
        (
            Kernel,
            {"module_call_match": ["^inner$"], "other": 2.0},
            "inner is given was not captured, or differs",
        ),
    ],
)
def test_why_no_operator_is_named_is_said(
    tmp_path: Path, make: Callable[[float], nn.Module], keys: dict[str, Any], said: str
) -> None:
    found = explanation(tmp_path, make, **keys)
    assert not found.found and said in str(found), str(found)


def test_another_engine_is_proposed_where_there_is_one(tmp_path: Path) -> None:
    found = explanation(tmp_path, Kernel)
    assert "or with --engine transformers" in str(found)
