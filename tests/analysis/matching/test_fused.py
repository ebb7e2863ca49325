"""One projection of one run against several of the other, as vLLM and transformers compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore.analysis.matching.fused import apart, parts_of
from tlcore.analysis.matching.pairs import Key, Located
from tlcore.layout.rows import CallRows

WIDTH, HEADS, SHARED = 8, 8, 4
WIDTHS = {"q": HEADS, "k": SHARED, "v": SHARED}


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


def _located(module: str, shape: list[int], **more: object) -> Located:
    record = {"name": f"step_0/{module}/outputs_cpu", "call": 0, "shape": shape, "dtype": "float32"}
    return Located(0, (str(record["name"]),), ({**record, "bytes": 4 * shape[0] * shape[1], **more},))


def test_parts_that_ranks_hold_pieces_of_are_as_wide_as_when_they_are_joined() -> None:
    def piece(module: str, width: int) -> Located:
        layout = {"placements": ["S1"], "shape": [3, width], "mesh": [0, 1], "rank": 0}
        return _located(module, [3, width // 2], placements=layout)

    single: dict[Key, Located] = {
        (0, f"{name}_proj", 0, "outputs", ()): piece(f"{name}_proj", width) for name, width in WIDTHS.items()
    }
    key: Key = (0, "qkv_proj", 0, "outputs", (0,))
    found = parts_of({key: _located("qkv_proj", [3, 16])}, single)
    assert [columns for _, columns in found[key]] == [(0, 8, 16), (8, 12, 16), (12, 16, 16)]
    assert not parts_of({key: _located("qkv_proj", [3, 8])}, single)


def test_whose_rows_a_part_has_is_told_by_all_of_its_tensor() -> None:
    rows = [{"request_id": "a", "first_row": 0, "rows": 3, "first_position": 4}]
    sets = [{"kind": "tokens", "rows": rows}]
    # A tensor of this shape was kept whole where of others these rows were chosen.
    entry = {"calls": ["qkv_proj"], "sets": sets, "whole": [[3, 16]]}
    laid_out = CallRows({"call_rows": [entry]})
    whole, other = _located("qkv_proj", [3, 16]), _located("qkv_proj", [3, 24])
    assert not laid_out.spans(whole.laid_out) and laid_out.spans(other.laid_out)
    assert not laid_out.spans(apart(whole, (0, 8, 16)).laid_out)
    assert laid_out.spans(apart(other, (0, 16, 24)).laid_out)
