"""Dumps of several ranks, or with steps counted otherwise, against a run of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.test_msprobe import _dump, _node
from tlcore.analysis import Comparison
from tlcore.errors import ReadError

Tensors = dict[str, torch.Tensor]
TOKENS = 5
APART = ("q_proj", "k_proj", "gate_proj", "up_proj")


def whole() -> Tensors:
    made = torch.Generator().manual_seed(3)
    layers = [f"model.layers.{layer}" for layer in range(2)]
    widths = {"self_attn.q_proj": 8, "self_attn.k_proj": 4, "self_attn.v_proj": 4, "mlp.gate_proj": 12}
    widths |= {"mlp.up_proj": 12, "mlp.down_proj": 8}
    named = {f"{layer}.{name}": width for layer in layers for name, width in widths.items()}
    return {name: torch.randn(TOKENS, width, generator=made) for name, width in named.items()}


def one(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def part(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank of two has: of some results half of the columns, of the others all."""
    halves = tensor.chunk(2, -1) if name.endswith((*APART, "v_proj")) else (tensor, tensor)
    return halves[rank].contiguous()


def ranks(path: Path, held: Callable[[int], Tensors], step: int = 0, count: int = 2) -> Path:
    """A dump of msprobe, which does not tell how ranks share the model."""
    for rank in range(count):
        tensors = {f"Module.{name}.L.forward.0": each for name, each in held(rank).items()}
        data = {name: {"output": [_node(name, each)]} for name, each in tensors.items()}
        _dump(path / f"step{step}" / f"rank{rank}", data, tensors)
    return path


def shared(path: Path, tensors: Tensors, fault: tuple[str, int] | None = None) -> Path:
    def held(rank: int) -> Tensors:
        found = {name: part(name, each, rank) for name, each in tensors.items()}
        if fault is not None and fault[1] == rank:
            found[fault[0]] = found[fault[0]].clone()
            found[fault[0]][3, 1] += 1
        return found

    return ranks(path, held)


def told(found: Comparison) -> list[tuple[str, int]]:
    return [(each.module, each.rank) for each in found.results if not each.agrees]


def test_what_ranks_have_alike_is_held_on_each_and_parts_are_joined(tmp_path: Path) -> None:
    a, b = one(tmp_path / "a.safetensors", whole()), shared(tmp_path / "b", whole())
    for found in (tlcore.compare(a, b), tlcore.compare(b, a)):
        assert found.equal
        # Ten results in parts, and two that both ranks have.
        assert len(found.results) == 10 + 2 * 2
        assert any("ranks 0, 1 are each held against" in note for note in found.notes)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_is_named(tmp_path: Path, name: str, rank: int) -> None:
    a, b = one(tmp_path / "a.safetensors", whole()), shared(tmp_path / "b", whole(), (name, rank))
    for found in (tlcore.compare(a, b), tlcore.compare(b, a)):
        # What is joined counts as the first rank's.
        assert told(found) == [(name, 0 if name.endswith(APART) else rank)]


def test_fused_parts_lie_by_rank_and_are_joined_by_what_the_other_has(tmp_path: Path) -> None:
    def fused(fault: bool) -> Callable[[int], Tensors]:
        def held(rank: int) -> Tensors:
            tensors, found = whole(), Tensors()
            for layer in ("model.layers.0", "model.layers.1"):
                for module, names in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                    outer = f"{layer}.{module.partition('.')[0]}"
                    parts = [part(f"{n}_proj", tensors[f"{outer}.{n}_proj"], rank) for n in names]
                    found[f"{layer}.{module}_proj"] = torch.cat(parts, -1)
                found[f"{layer}.mlp.down_proj"] = tensors[f"{layer}.mlp.down_proj"]
            if fault and rank:
                # Of rank 1's queries, keys and values: the first of its keys.
                found["model.layers.1.self_attn.qkv_proj"][2, 4] += 1
            return found

        return held

    a = one(tmp_path / "a.safetensors", whole())
    assert tlcore.compare(a, ranks(tmp_path / "b", fused(False))).equal
    bad = tlcore.compare(a, ranks(tmp_path / "c", fused(True)))
    assert told(bad) == [("model.layers.1.self_attn.k_proj", 0)]
    assert bad.results[told_at(bad)].measures.largest_at == (2, 2)  # type: ignore[union-attr]
    joined = whole()
    for layer in ("model.layers.0", "model.layers.1"):
        both = [joined.pop(f"{layer}.mlp.{name}_proj") for name in ("gate", "up")]
        joined[f"{layer}.mlp.gate_up_proj"] = torch.cat(both, -1)
    apart = {name: each for name, each in joined.items() if "self_attn" not in name}
    found = tlcore.compare(
        one(tmp_path / "d.safetensors", apart), tmp_path / "b", modules="mlp", ignore_missing=True
    )
    assert found.equal and any(each.module.endswith("gate_up_proj") for each in found.results)


def told_at(found: Comparison) -> int:
    return next(at for at, each in enumerate(found.results) if not each.agrees)


def test_parts_that_nothing_explains_are_said_to_differ_and_what_no_rank_has_is_said_once(
    tmp_path: Path,
) -> None:
    a = one(tmp_path / "a.safetensors", whole())
    name = "model.layers.0.mlp.up_proj"

    def held(rank: int) -> Tensors:
        found = {each: part(each, tensor, rank) for each, tensor in whole().items()}
        found[name] = found[name][:, :5].contiguous()
        del found["model.layers.1.self_attn.q_proj"]
        return found

    found = tlcore.compare(a, ranks(tmp_path / "b", held))
    assert told(found) == [(name, 0), (name, 1), ("model.layers.1.self_attn.q_proj", 0)]
    assert "shapes (5, 12) and (5, 5) differ" in (found.results[told_at(found)].reason or "")
    assert any("shapes and ranks differ (1 rank against 2)" in note for note in found.notes)


def test_stages_of_a_pipeline_make_up_the_model(tmp_path: Path) -> None:
    a = one(tmp_path / "a.safetensors", whole())

    def held(rank: int) -> Tensors:
        return {name: each for name, each in whole().items() if f"layers.{rank}." in name}

    found = tlcore.compare(a, ranks(tmp_path / "b", held))
    assert found.equal and len(found.results) == len(whole())


@pytest.mark.parametrize("numbers", [(100, 200), (7, 8)])
def test_steps_that_another_tool_counts_otherwise_are_paired_in_order(
    tmp_path: Path, numbers: tuple[int, int]
) -> None:
    for place in range(2):
        tensors = {name: each + place for name, each in whole().items()}
        (tmp_path / "a").mkdir(exist_ok=True)
        torch.save(tensors, tmp_path / "a" / f"step_{place}.pt")
        ranks(tmp_path / "b", lambda rank, held=tensors: held, numbers[place], count=1)  # type: ignore[misc]
    found = tlcore.compare(tmp_path / "a", tmp_path / "b")
    assert found.equal and {each.step for each in found.results} == {0, 1}
    shown = f"A's steps 0, 1 are held against B's {numbers[0]}, {numbers[1]}, in order"
    assert any(shown in note for note in found.notes)
    tensors["model.layers.1.mlp.down_proj"] = tensors["model.layers.1.mlp.down_proj"] + 1
    ranks(tmp_path / "c", lambda rank: whole(), numbers[0], count=1)
    ranks(tmp_path / "c", lambda rank: tensors, numbers[1], count=1)
    bad = tlcore.compare(tmp_path / "a", tmp_path / "c").first_divergence
    assert bad is not None and (bad.module, bad.step) == ("model.layers.1.mlp.down_proj", 1)
    some = tlcore.compare(tmp_path / "a", tmp_path / "b", steps=[1, numbers[1]])
    assert some.equal and {each.step for each in some.results} == {1}


def test_steps_of_a_tool_that_counts_from_one_are_paired_by_that(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for place in range(3):
        tensors = {name: each + place for name, each in whole().items()}
        torch.save(tensors, tmp_path / "a" / f"step_{place}.pt")
        phase = "tkg" if place else "cte"
        for name, each in tensors.items():
            torch.save(
                each, tmp_path / "b" / f"captured_tensors_{phase}_step_{place + 1}_module_{name}_output.pt"
            )
    for one, other in (("a", "b"), ("b", "a")):
        found = tlcore.compare(tmp_path / one, tmp_path / other)
        assert found.equal and len(found.results) == 3 * len(whole())
        assert any("steps are counted from" in note for note in found.notes)
    (tmp_path / "a" / "step_0.pt").unlink()
    found = tlcore.compare(tmp_path / "a", tmp_path / "b", ignore_missing=True)
    assert found.equal and {each.step for each in found.results if each.status == "bitwise"} == {1, 2}


def test_steps_without_a_counterpart_are_told(tmp_path: Path) -> None:
    torch.save(whole(), tmp_path / "a.pt")
    for step in (3, 4):
        ranks(tmp_path / "b", lambda rank: whole(), step, count=1)
    found = tlcore.compare(tmp_path / "a.pt", tmp_path / "b")
    assert not found.equal
    told = "A has steps 0, B has 3, 4, so none is in both"
    assert any(told in note for note in found.not_compared)
    with pytest.raises(ReadError, match=f"no tensor to compare .{told}"):
        tlcore.compare(tmp_path / "a.pt", tmp_path / "b", ignore_missing=True)
