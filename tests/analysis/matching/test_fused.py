"""One projection of one run against several of the other, as vLLM and transformers compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore

WIDTH, HEADS, SHARED = 8, 8, 4


class _Fused(nn.Module):
    """vLLM's linear layers return a bias beside their result."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Linear(taken, given).parameters()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(x, self.weight, self.bias), None


class _AsVllm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = _Fused(WIDTH, HEADS + 2 * SHARED)
        self.gate_up_proj = _Fused(WIDTH, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x)[0].split([HEADS, SHARED, SHARED], -1)
        gate, up = self.gate_up_proj(q + torch.cat([k, v], -1))[0].chunk(2, -1)
        result: torch.Tensor = gate * up
        return result


class _AsTransformers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, SHARED)
        self.v_proj = nn.Linear(WIDTH, SHARED)
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q_proj(x) + torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        result: torch.Tensor = self.gate_proj(x) * self.up_proj(x)
        return result


def _pair(fault: str = "") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one, several = _AsVllm().eval(), _AsTransformers().eval()
    with torch.no_grad():
        for fused, parts in (("qkv_proj", ("q", "k", "v")), ("gate_up_proj", ("gate", "up"))):
            for kind in ("weight", "bias"):
                each = [several.get_parameter(f"{part}_proj.{kind}") for part in parts]
                whole = one.get_parameter(f"{fused}.{kind}")
                for own, rows in zip(each, torch.split(whole, [len(own) for own in each]), strict=True):
                    own.copy_(rows)
        if fault:
            several.get_parameter(f"{fault}.weight")[1, 2] += 1
    return one, several


def _captured(directory: Path, models: tuple[nn.Module, nn.Module]) -> list[str]:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    urls = []
    for model in models:
        with torch.no_grad(), tlcore.capture(model, output_dir=str(directory)) as capture:
            model(x)
        urls.append(str(capture.url))
    return urls


def test_each_part_is_compared_with_its_columns_whichever_run_has_them_in_one(tmp_path: Path) -> None:
    urls = _captured(tmp_path, _pair())
    for a, b in (urls, urls[::-1]):
        found = tlcore.compare(a, b)
        assert found.equal, str(found)
        modules = [each.module for each in found.results if each.direction == "outputs"]
        assert modules == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", ""]


@pytest.mark.parametrize("fault", ["k_proj", "v_proj", "up_proj"])
def test_a_fault_in_one_part_is_found_there(tmp_path: Path, fault: str) -> None:
    urls = _captured(tmp_path, _pair(fault))
    for a, b in (urls, urls[::-1]):
        found = tlcore.compare(a, b, deep=True)
        first = found.first_divergence
        assert first is not None and (first.module, first.direction) == (fault, "outputs")
        assert next(each.module for each in found.results if each.status == "different") == fault


def test_other_parts_than_the_whole_has_are_not_paired(tmp_path: Path) -> None:
    one, several = _pair()
    one.qkv_proj = _Fused(WIDTH, HEADS + 2 * SHARED + 2)
    one.forward = lambda x: one.get_submodule("qkv_proj")(x)[0]
    found = tlcore.compare(*_captured(tmp_path, (one, several)), ignore_missing=True)
    assert not {"q_proj", "v_proj"} & {each.module for each in found.results if each.direction == "outputs"}
