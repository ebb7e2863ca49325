"""Two dumps of several ranks each, which are not as many: none goes unseen, no part counts as another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore

GATE_UP = "model.layers.0.mlp.gate_up_proj"
UP, DOWN, NORM, QKV = "model.layers.0.mlp.up", "model.layers.0.mlp", "model.norm", "model.layers.0.qkv_proj"


def _dump(
    directory: Path, size: int, fault: tuple[str, int] | None = None, told: bool = False, more: Any = None
) -> Path:
    """What SGLang's dumper writes of a model of ``size`` ranks; at ``fault`` one has another value."""
    directory.mkdir()
    made = torch.Generator().manual_seed(3)
    up, gate, down, norm = (torch.randn(5, 16, generator=made) for _ in range(4))
    for rank in range(size):
        columns = slice(16 // size * rank, 16 // size * (rank + 1))
        held = {
            UP: up[:, columns],
            GATE_UP: torch.cat([gate[:, columns], up[:, columns]], 1),
            DOWN: down,
            NORM: norm,
            **{name: value[rank] for name, value in (more or {}).items()},
        }
        info = {"tp_rank": rank, "tp_size": size, "pp_rank": 0, "pp_size": 1}
        for index, (name, tensor) in enumerate(held.items()):
            if tensor is None:
                continue
            value = tensor.clone()
            if fault == (name, rank):
                value[2, 1] += 1
            meta: dict[str, Any] = {"step": 0, "rank": rank, "world_size": size}
            if told:
                meta["sglang_parallel_info"] = info
            tags = f"step=0___rank={rank}___dump_index={index}___name=non_intrusive__{name}.output"
            torch.save({"value": value, "meta": meta}, directory / f"{tags}.pt")
    return directory


def _differing(compared: Any) -> set[str]:
    return {each.module for each in compared.results if not each.agrees}


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("size", "other"), [(2, 4), (4, 2), (2, 8)])
def test_parts_are_joined_on_both_sides_and_all_else_is_held_rank_by_rank(
    tmp_path: Path, size: int, other: int, told: bool
) -> None:
    one, two = _dump(tmp_path / "one", size, told=told), _dump(tmp_path / "two", other, told=told)
    found = tlcore.compare(one, two)
    assert found.equal and found.counts["bitwise"] == 2 + 2 * max(size, other)
    assert any("ranks of both runs are held against one another" in note for note in found.notes)
    number = 0
    for name in (UP, GATE_UP, DOWN, NORM):
        for rank in range(size):
            number += 1
            bad = _dump(tmp_path / f"bad{number}", size, (name, rank), told=told)
            for compared in (tlcore.compare(bad, two), tlcore.compare(two, bad)):
                assert _differing(compared) == {name}


def test_what_cannot_be_joined_is_told_and_never_as_equal(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(4)
    whole = torch.randn(5, 24, generator=made)
    # Nothing tells how wide queries and keys are; summands of two ranks are not those of four.
    more: list[dict[str, Any]] = [
        {
            QKV: [whole[:, 24 // size * rank : 24 // size * (rank + 1)] for rank in range(size)],
            "model.sum": [whole * 2 * (rank + 1) / (size * size + size) for rank in range(size)],
        }
        for size in (2, 4)
    ]
    one, two = _dump(tmp_path / "one", 2, more=more[0]), _dump(tmp_path / "two", 4, more=more[1])
    found = tlcore.compare(one, two)
    assert _differing(found) == {QKV, "model.sum"}
    assert any("what ranks have summands of differs" in note for note in found.notes)


def test_stages_of_a_pipeline_are_held_against_ranks_that_share_each_layer(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(5)
    first, second = (torch.randn(5, 16, generator=made) for _ in range(2))
    shared = {"model.layers.1": [first] * 4, "model.layers.2": [second] * 4}
    staged: dict[str, Any] = {"model.layers.1": [first, None], "model.layers.2": [None, second]}
    four = _dump(tmp_path / "four", 4, more=shared)
    assert tlcore.compare(_dump(tmp_path / "two", 2, more=staged), four).equal
    for number, (name, rank) in enumerate((("model.layers.1", 0), ("model.layers.2", 1))):
        bad = _dump(tmp_path / f"bad{number}", 2, (name, rank), more=staged)
        for compared in (tlcore.compare(bad, four), tlcore.compare(four, bad)):
            assert _differing(compared) == {name}
