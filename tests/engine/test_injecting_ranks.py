"""What a rank injects where the run that is injected lacks something on another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.engine.test_row_injection import Engine, injecting
from tests.ranked import ranks_run
from tlcore.layout.rows import RowSet
from tlcore.reader.request import Request


def _ranks(tmp_path: Path, by: str) -> list[dict[str, Any]]:
    found = [dict(place) for place in ranks_run(tmp_path, [{"a": torch.ones(2)}] * 2, {}).ranks.values()]
    if by == "pp":
        for place in found:
            place.update(pp_rank=place["tp_rank"], pp_size=2, tp_rank=0, tp_size=1)
    return found


def _other(tmp_path: Path, ranks: list[dict[str, Any]], lacking: int, most: int) -> Any:
    """A run whose rank ``lacking`` skips what has more than ``most`` elements."""
    for rank in (0, 1):
        keys = {"max_tensor_size": most} if rank == lacking else {}
        engine = Engine(tmp_path / "a", ranks=ranks, rank=rank, **keys)
        engine.step(("a", 0, [5, 6]))
        engine.step(("a", 2, [7, 8]), ("b", 0, [5, 6]))
        other = engine.close()
    return other


def _injected(other: Any, tmp_path: Path, ranks: list[dict[str, Any]], rank: int) -> tuple[Any, Any]:
    engine = injecting(other, tmp_path, ranks=ranks, rank=rank)
    found = engine.step(("a", 0, [5, 6, 7]))
    found += engine.step(("a", 3, [8]))
    injection = engine.session.row_injection
    assert injection is not None
    said = injection.remarks()
    engine.session.close()
    return found, (dict(injection.left_out), said)


def test_a_stop_on_one_pipeline_stage_is_one_on_those_behind(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, "pp")
    other = _other(tmp_path, ranks, lacking=0, most=7)
    for rank in (0, 1):
        found, (left_out, _) = _injected(other, tmp_path, ranks, rank)
        assert found == [10, 12, 114, 116], rank
        (first, second) = left_out
        assert "no result of this position" in first and left_out[first] == 1
        assert ("a pipeline stage before" in first) == (rank == 1)
        assert "a position before it was not injected" in second and left_out[second] == 1


def test_a_stage_does_not_rest_on_those_behind(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, "pp")
    other = _other(tmp_path, ranks, lacking=1, most=7)
    assert _injected(other, tmp_path, ranks, 0)[0] == [10, 12, 14, 16]
    assert _injected(other, tmp_path, ranks, 1)[0] == [10, 12, 114, 116]


def test_stages_before_are_asked_of_injected_modules_alone(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, "pp")
    other = _other(tmp_path, ranks, lacking=0, most=7)
    # The first call of the model itself lacks positions there, too, and nobody injects it.
    keys = {"inject": {"run": other.url, "modules": ["^other$"]}}
    engine = Engine(tmp_path / "b", 100.0, ranks=ranks, rank=1, **keys)
    assert engine.step(("a", 0, [5, 6, 7])) == [110, 112, 114]
    injection = engine.session.row_injection
    assert injection is not None and not injection.left_out
    engine.session.close()


def test_what_an_encoder_on_a_stage_before_gives_of_some_positions_stops_nothing(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, "pp")
    for rank in (0, 1):
        engine = Engine(tmp_path / "a", ranks=ranks, rank=rank)
        if rank:
            engine.step(("a", 0, [5, 6]))
        else:
            session = engine.session
            assert session.begin_step()
            entry = {"request_id": "a", "first_row": 0, "rows": 1, "first_position": 1, "prompt_hash": "ha"}
            session.rows.batch(["a"])
            session.rows.enter([RowSet("item_tokens", [entry])])
            engine.model(torch.tensor([[6.0, 1.0]]))
            session.end_step()
        other = engine.close()
    engine = injecting(other, tmp_path, ranks=ranks, rank=1)
    assert engine.step(("a", 0, [5, 6])) == [10, 12]
    engine.session.close()


def test_of_what_one_rank_did_not_store_at_all_no_rank_injects_anything(tmp_path: Path) -> None:
    ranks = _ranks(tmp_path, "tp")
    other = _other(tmp_path, ranks, lacking=1, most=1)
    for rank in (0, 1):
        found, (left_out, _) = _injected(other, tmp_path, ranks, rank)
        assert found == [110, 112, 114, 116], rank
        assert left_out == {"the other run has no result of this call": 4}


def test_what_a_rank_cannot_read_is_said_to_part_it_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = _ranks(tmp_path, "tp")
    other = _other(tmp_path, ranks, lacking=-1, most=1)
    assert not any("mixes" in each for each in _injected(other, tmp_path, ranks, 1)[1][1])

    def damaged(self: Request, name: str, positions: Any) -> Any:
        raise tlcore.ReadError("damaged")

    monkeypatch.setattr(Request, "rows_at", damaged)
    found, (_, said) = _injected(other, tmp_path, ranks, 1)
    assert found == [110, 112, 114, 116]
    assert "mixes both models" in said[-1] and "tlcore verify" in said[-1]
