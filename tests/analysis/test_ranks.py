"""Runs of different numbers of ranks are compared by the model's tensors, the parts joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.ranked import ranks_run

MERGED, ADDED = {"0": {"dim": -1, "parts": [1, 1]}}, {"0": {"sum": True}}
SHARDED = {
    "a_proj": {"inputs": MERGED, "outputs": MERGED},
    "b_proj": {"inputs": ADDED, "outputs": ADDED},
}


def _tensors(ranks: int, change: float = 0.0) -> list[dict[str, Any]]:
    """The same model's tensors over so many ranks: a gate and an up projection, and partial sums."""
    gate = torch.arange(6.0).view(3, 2)
    up = gate + 10
    up[2, 1] += change
    both = [torch.cat([each.chunk(ranks, 1)[rank] for each in (gate, up)], 1) for rank in range(ranks)]
    total = torch.full((3, 2), 8.0)
    norm = torch.arange(3.0)
    return [{"a_proj": both[rank], "b_proj": total / ranks, "norm": norm} for rank in range(ranks)]


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_one_rank_and_two_agree_where_the_model_does(tmp_path: Path, backend: str) -> None:
    one = ranks_run(tmp_path / "one", _tensors(1), {}, backend)
    two = ranks_run(tmp_path / "two", _tensors(2), SHARDED, backend)
    for a, b in ((one, two), (two, one)):
        found = tlcore.compare(a, b)
        assert {each.module for each in found.results} == {"a_proj", "b_proj", "norm"}
        assert {each.status for each in found.results} == {"bitwise"}
        assert len(found.results) == 6


def test_a_difference_in_one_ranks_part_is_found(tmp_path: Path) -> None:
    one = ranks_run(tmp_path / "one", _tensors(1), {})
    two = ranks_run(tmp_path / "two", _tensors(2, change=0.5), SHARDED)
    found = tlcore.compare(one, two)
    (wrong,) = [each for each in found.results if each.direction == "outputs" and each.status == "different"]
    assert (wrong.module, wrong.rank) == ("a_proj", 0)


def test_runs_of_the_same_ranks_are_compared_rank_by_rank(tmp_path: Path) -> None:
    a, b = (ranks_run(tmp_path / name, _tensors(2), SHARDED) for name in ("a", "b"))
    found = tlcore.compare(a, b)
    assert {each.status for each in found.results} == {"bitwise"}
    assert {each.rank for each in found.results} == {0, 1}


def test_a_fault_is_found_on_the_stage_where_it_arose_not_where_it_is_sent(tmp_path: Path) -> None:
    def run(name: str, fault: float) -> Any:
        good, bad = torch.ones(3, 2), torch.ones(3, 2) + fault
        # The second stage's first tensor is what the last one of the first stage gave.
        stages = [{"embed": good, "layers_0": good, "layers_1": bad}, {"received": bad, "layers_2": bad}]
        found = ranks_run(tmp_path / name, stages, {})
        for document in map(_file, Path(found.url).rglob("run*.json")):
            for place in document["ranks"]:
                place.update(pp_rank=place["rank"], pp_size=2, tp_rank=0, tp_size=1)
            Path(document.pop("at")).write_text(json.dumps(document))
        return tlcore.open_run(found.url)

    first = tlcore.compare(run("a", 0.0), run("b", 1.0)).first_divergence
    assert first is not None and (first.module, first.result.rank) == ("layers_1", 0)


def _file(path: Path) -> dict[str, Any]:
    return {**json.loads(path.read_text()), "at": str(path)}
