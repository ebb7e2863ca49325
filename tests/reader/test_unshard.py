"""Tensors of which each rank holds a part, and how they are joined."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tlcore
from tests.ranked import ranks_run
from tlcore.errors import ReadError
from tlcore.reader import MissingError
from tlcore.reader.request import _row_kind
from tlcore.reader.unshard import group_of, joined, part_of, places_of

BACKENDS = ["pt", "safetensors"]


def _qkv(size: int, kv_heads: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
    """A whole (3, 4 x 2 + 2 x 2 x kv_heads) tensor, each rank's, and the description; heads of size 2."""
    q, k, v = torch.randn(3, 8), torch.randn(3, 2 * kv_heads), torch.randn(3, 2 * kv_heads)
    copies = max(1, size // kv_heads)
    local = []
    for rank in range(size):
        own = [q.chunk(size, 1)[rank], *(each.chunk(size // copies, 1)[rank // copies] for each in (k, v))]
        local.append(torch.cat(own, 1))
    kv = 2 * kv_heads * copies // size
    part = {"dim": -1, "parts": [8 // size, kv, kv], "copies": [1, copies, copies]}
    return torch.cat([q, k, v], 1), local, part


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (2, 2), (4, 2), (4, 1), (1, 2)])
def test_query_key_and_value_are_joined_separately(size: int, kv_heads: int) -> None:
    whole, local, part = _qkv(size, kv_heads)
    assert torch.equal(joined({**part, "tp_size": size}, local, "x"), whole)


def test_partial_sums_are_added_in_higher_precision() -> None:
    parts = [torch.tensor([256.0], dtype=torch.bfloat16), *[torch.tensor([1.0], dtype=torch.bfloat16)] * 3]
    total = joined({"sum": True, "tp_size": 4}, parts, "x")
    assert (total.dtype, total.item()) == (torch.bfloat16, 260.0)


@pytest.mark.parametrize("one", [1.0, float("nan")])
def test_what_a_module_may_have_added_up_itself_is_added_only_where_ranks_differ(one: float) -> None:
    part = {"sum": True, "or_whole": True, "tp_size": 2}
    whole = torch.tensor([one, 2.0])
    assert torch.equal(joined(part, [whole, whole.clone()], "x")[1:], whole[1:])
    assert torch.equal(joined(part, [whole, torch.tensor([1.0, 3.0])], "x")[1:], torch.tensor([5.0]))


def test_what_is_not_known_is_never_joined(tmp_path: Path) -> None:
    part = {"unknown": "several batches are computed together"}
    tensors = [{"a_proj": torch.ones(2, 3), "norm": torch.ones(2)}] * 2
    run = ranks_run(tmp_path, tensors, {"a_proj": {"outputs": {"*": part}}})
    assert torch.equal(run.tensor("step_0/a_proj/outputs_0_cpu"), torch.ones(2, 3))
    with pytest.raises(ReadError, match=r"a_proj/outputs_0_cpu: .*several batches are computed together"):
        run.tensor("step_0/a_proj/outputs_0_cpu", unshard=True)
    assert torch.equal(run.tensor("step_0/norm/outputs_cpu", unshard=True), torch.ones(2))
    single = ranks_run(tmp_path / "single", tensors[:1], {})
    found = tlcore.compare(single, run, ignore_missing=True)
    assert [each.module for each in found.results if each.status == "unreadable"] == ["a_proj"]
    assert not found.equal and found.first_divergence is None


def test_what_passes_for_whole_but_differs_between_ranks_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    """A layer of a kind that nobody has described: each rank's part looks like any other tensor."""
    odd, same, near = torch.randn(2, 4, 3), torch.ones(2), torch.randn(3)
    ids = torch.tensor([[1, 2], [1, 3]])
    tensors = [
        {"odd": odd[rank], "same": same, "near": near * (1 + rank * 1e-5), "ids": ids[rank]}
        for rank in (0, 1)
    ]
    run = ranks_run(tmp_path, tensors, {})
    for name in ("odd", "ids"):
        own = f"step_0/{name}/outputs_cpu"
        assert torch.equal(run.tensor(own), tensors[0][name])
        with pytest.raises(ReadError, match=f"{name}/outputs.*each rank has another one"):
            run.tensor(own, unshard=True)
    for name in ("same", "near"):
        assert torch.equal(run.tensor(f"step_0/{name}/outputs_cpu", unshard=True), tensors[0][name])
    single = ranks_run(tmp_path / "single", tensors[:1], {})
    found = tlcore.compare(single, run, ignore_missing=True)
    assert {each.module for each in found.results if each.status == "unreadable"} == {"odd", "ids"}
    assert found.first_divergence is None
    # Rank by rank nothing needs to be joined.
    assert tlcore.compare(run, ranks_run(tmp_path / "again", tensors, {})).equal


@pytest.mark.parametrize("ranks", [[[1.0, 2.0], [1.0, float("nan")]], [[1.0, 2.0], [1.0, -2.0]]])
def test_parts_are_not_alike_for_some_equal_numbers(ranks: list[list[float]]) -> None:
    part = {"unknown": "nobody knows", "or_alike": True, "tp_size": 2}
    with pytest.raises(ReadError, match="nobody knows"):
        joined(part, [torch.tensor(each) for each in ranks], "x")
    assert torch.equal(joined(part, [torch.tensor(ranks[0])] * 2, "x"), torch.tensor(ranks[0]))


def test_tokens_that_context_parallelism_splits_are_never_joined(tmp_path: Path) -> None:
    run = ranks_run(tmp_path, [{"norm": torch.ones(2)}] * 2, {})
    path = Path(run.url) / "run.json"
    document = json.loads(path.read_text())
    for place in document["ranks"]:
        place.update(pcp_rank=place["tp_rank"], pcp_size=2, tp_rank=0, tp_size=1)
    path.chmod(0o600)
    path.write_text(json.dumps(document))
    split = tlcore.open_run(run.url)
    assert torch.equal(split.tensor("step_0/norm/outputs_cpu"), torch.ones(2))
    with pytest.raises(ReadError, match="prefill context parallelism splits the tokens over ranks"):
        split.tensor("step_0/norm/outputs_cpu", unshard=True)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"dim": -1, "tp_size": 3}, "2 ranks for the 3 parts"),
        ({"dim": -1, "tp_size": 2, "parts": [1, 1]}, "4 elements along dimension -1, not 2"),
        ({"dim": 5, "tp_size": 2}, "cannot be joined"),
        ({"dim": -1, "tp_size": 2, "parts": [2, 2], "copies": None}, "not known"),
    ],
)
def test_parts_that_cannot_be_joined_are_named(part: dict[str, Any], problem: str) -> None:
    with pytest.raises(ReadError, match=rf"step_0/x: .*{problem}"):
        joined(part, [torch.ones(1, 4), torch.ones(1, 4)], "step_0/x")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_joins_its_ranks_tensors(tmp_path: Path, backend: str) -> None:
    whole, local, part = _qkv(2, 2)
    tensors = [{"qkv_proj": each, "norm": torch.ones(2)} for each in local]
    run = ranks_run(tmp_path, tensors, {"qkv_proj": {"outputs": {"0": part}}}, backend)
    assert (run.state, run.ranks[1]["tp_rank"], run.verify()) == ("complete", 1, 8)
    for name in ("step_0/qkv_proj/outputs_0_cpu", "step_0/qkv_proj/outputs_0_cpu_rank_1.pt"):
        assert torch.equal(run.tensor(name, unshard=True), whole)
    assert torch.equal(run.tensor("step_0/qkv_proj/outputs_0_cpu"), local[0])
    assert torch.equal(run.tensor("step_0/norm/outputs_cpu", unshard=True), torch.ones(2))
    step = run.step(0)
    assert step.record("step_0/qkv_proj/outputs_0_cpu_rank_1")["part"] == {**part, "tp_rank": 1, "tp_size": 2}
    assert "part" not in step.record("step_0/norm/outputs_cpu")
    assert [each["rank"] for each in step.parts("step_0/qkv_proj/outputs_0_cpu")] == [0, 1]
    place: Any = SimpleNamespace(
        step=step, name="step_0/qkv_proj/outputs_0_cpu", span=SimpleNamespace(axis=0)
    )
    for unshard, tensor in ((True, whole), (False, local[0])):
        assert _row_kind(place, unshard) == (str(tensor.dtype)[6:], tuple(tensor.shape[1:]))


def test_a_part_that_was_not_stored_is_named(tmp_path: Path) -> None:
    tensors = [{"a_proj": torch.ones(1, 2), "norm": torch.ones(1)}, {"norm": torch.ones(1)}]
    run = ranks_run(tmp_path, tensors, {"a_proj": {"outputs": {"0": {"dim": -1}}}})
    with pytest.raises(MissingError, match="the part of rank 1 was not stored"):
        run.tensor("step_0/a_proj/outputs_0_cpu", unshard=True)


@pytest.mark.parametrize(
    "sharding",
    [
        1,
        {"tensors": []},
        {"tensors": {"m": {"outputs": {"0": {"dim": 0}}}}},
        {"tp_rank": 0, "tp_size": 2, "tensors": {"m": {"outputs": {"0": {"dim": "x"}}}}},
        {"tp_rank": 0, "tp_size": 2, "tensors": {"m": {"outputs": {"0": {"dim": 0, "copies": [0]}}}}},
        {"tp_rank": 0, "tp_size": 2, "tensors": {"m": {"outputs": {"0": {}}}}},
    ],
)
def test_a_damaged_description_is_named(sharding: Any) -> None:
    with pytest.raises(ReadError, match="damaged sharding"):
        part_of(sharding, {"module": "m", "direction": "outputs", "path": [0]})


def test_places_group_the_ranks_of_one_stage() -> None:
    def place(rank: int) -> dict[str, int]:
        alone = {"pcp_rank": 0, "pcp_size": 1, "dp_rank": 0, "dp_size": 1}
        return {"rank": rank, "tp_rank": rank % 2, "tp_size": 2, "pp_rank": rank // 2, "pp_size": 2, **alone}

    places = places_of({"world_size": 4, "ranks": [place(rank) for rank in (3, 1, 0, 2)]})
    assert [group_of(places, rank) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert places_of({"world_size": 1 << 40}) == {}
    assert group_of({}, 3) == [3]
    with pytest.raises(ReadError, match="ranks 0 to 1"):
        places_of({"world_size": 2, "ranks": [place(0)]})
    with pytest.raises(ReadError, match="damaged entry 'ranks'"):
        places_of({"world_size": 1, "ranks": [{"rank": 0}]})
