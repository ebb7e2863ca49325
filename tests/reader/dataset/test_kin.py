"""Steps that differ in numbers alone are looked at once, and give what looking at each of them gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranked import Rows, requests_run
from tlcore.errors import ReadError
from tlcore.reader import Run
from tlcore.reader.dataset.dataset import RowDataset
from tlcore.reader.dataset.kin import Kin
from tlcore.reader.dataset.table import Table
from tlcore.reader.outlines import OutlinedStep, outlined

NAMES = ["b/outputs", "a/outputs"]
Told = list[dict[str, Any]]


@pytest.fixture(params=["safetensors", "pt"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _served(
    path: Path,
    steps: list[Rows],
    change: Callable[[int, Told], None] = lambda step, told: None,
    backend: str = "safetensors",
) -> Run:
    """A run of these steps with token ids; ``change`` alters what a step tells of these."""
    values = torch.Generator().manual_seed(0)

    def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        count = sum(row["rows"] for row in rows)
        return {name: torch.randn(count, 3, generator=values) for name in ("a", "b")}

    def extra(step: int) -> dict[str, Any]:
        told: Told = []
        for request, count, first in steps[step]:
            ids = [len(request) + 7 * at for at in range(first, first + count)]
            told.append({"request_id": request, "prompt": 4, "first_position": first, "ids": ids})
        change(step, told)
        return {"tokens": told}

    return requests_run(path, steps, tensors, backend=backend, extra=extra)


def _mixed(seed: int) -> list[Rows]:
    """Requests that come in chunks, decode together, pause, go, and one that is computed anew."""
    draw = random.Random(seed)
    places = {f"r{number}-{number:08x}": 0 for number in range(7)}
    steps: list[Rows] = []
    while len(steps) < 40:
        there = [each for each in places if draw.random() < (0.97 if places[each] >= 4 else 0.3)]
        rows: list[tuple[str, int, int]] = []
        for request in there:
            count = 1 if places[request] >= 4 else draw.randint(1, 4)
            rows.append((request, count, places[request]))
            places[request] += count
        if draw.random() < 0.05:
            places["r0-00000000"] = 0
        if rows:
            steps.append(rows)
    return steps


def _content(data: RowDataset) -> list[dict[str, Any]]:
    return [{name: values.tolist() for name, values in item.items()} for item in data]


def _each_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> RowDataset:
    with monkeypatch.context() as patch:
        patch.setattr(Kin, "find", lambda self, step: None)
        return run.dataset(NAMES)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_steps_give_what_each_of_them_has(
    seed: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _served(tmp_path, _mixed(seed), backend=backend)
    data, plain = run.dataset(NAMES), _each_looked_at(run, monkeypatch)
    assert data.has_token_ids and data.has_prompts
    assert data.fingerprint == plain.fingerprint
    assert _content(data) == _content(plain)


def test_of_steps_of_one_kind_two_are_looked_at(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"r{number}-{number:08x}" for number in range(3)]
    steps: list[Rows] = [[(each, 4, 0) for each in ids]]
    steps += [[(each, 1, 4 + at) for each in ids] for at in range(30)]
    run = _served(tmp_path, steps, backend=backend)
    looked: list[int] = []
    look_at = Table._look_at

    def noted(self: Table, step: Any, *more: Any) -> None:
        looked.append(step.number)
        look_at(self, step, *more)

    monkeypatch.setattr(Table, "_look_at", noted)
    told: list[list[int]] = []
    series = OutlinedStep.series

    def asked(self: OutlinedStep, most: int) -> Any:
        found = series(self, most)
        told.append(list(found[0]))
        return found

    monkeypatch.setattr(OutlinedStep, "series", asked)
    data = run.dataset(NAMES, per="request")
    assert looked == [0, 1, 2]
    # Of those behind, each is told together with others.
    assert told == [[3, *range(4, 20)], [*range(20, 31)]]
    assert [len(item["positions"]) for item in data] == [34] * 3
    assert data[1]["token_ids"].tolist() == [len(ids[1]) + 7 * at for at in range(34)]


@pytest.mark.parametrize(
    "alter",
    [
        lambda told: told[1].update(accepted=0),
        lambda told: told[1].update(ids=[]),
        lambda told: told[1].update(ids=[1 << 40]),
        lambda told: told[1].update(prompt=3),
        lambda told: told.pop(1),
        lambda told: told[1].pop("prompt"),
    ],
)
def test_what_is_not_as_in_the_others_of_its_kind_is_seen(
    alter: Callable[[Told], Any], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"r{number}-{number:08x}" for number in range(3)]
    steps: list[Rows] = [[(each, 4, 0) for each in ids]]
    steps += [[(each, 1, 4 + at) for each in ids] for at in range(8)]
    run = _served(tmp_path, steps, lambda step, told: alter(told) if step == 6 else None, backend)
    data, plain = run.dataset(NAMES), _each_looked_at(run, monkeypatch)
    assert (data.has_token_ids, data.has_prompts) == (plain.has_token_ids, plain.has_prompts)
    assert _content(data) == _content(plain)


@pytest.mark.parametrize("number", [-1, (1 << 50) + 1, 1 << 70])
def test_a_position_that_there_is_not_is_refused_as_ever(
    number: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"r{number}-{number:08x}" for number in range(3)]
    steps: list[Rows] = [[(each, 4, 0) for each in ids]]
    steps += [[(each, 1, 4 + at) for each in ids] for at in range(8)]

    def alter(step: int, told: Told) -> None:
        if step == 6:
            told[1]["first_position"] = number

    run = _served(tmp_path, steps, alter, backend)
    with pytest.raises(ReadError) as found:
        run.dataset(NAMES)
    with pytest.raises(ReadError) as plain:
        _each_looked_at(run, monkeypatch)
    assert str(found.value) == str(plain.value)


def test_of_several_ranks_those_steps_are_told_together_that_all_of_them_have(tmp_path: Path) -> None:
    """Ranks' segments end at different steps, so each has others at hand."""
    run = _served(tmp_path, [[("r0-00000000", 1, at)] for at in range(9)])
    step = outlined(run, 2)
    own = step._outlines[0]
    steps, numbers = own.following(16)
    assert list(steps) == [3, 4, 5, 6, 7, 8]

    def of_rank(chosen: list[int]) -> Any:
        told = [steps[at] for at in chosen], numbers[chosen] + 1
        return own._replace(following=lambda most: told, numbers=lambda: [each + 1 for each in own.numbers()])

    for chosen, together in (([0, 1], [2, 3, 4]), ([0, 2, 3], [2, 3]), ([], [2]), ([1, 2], [2])):
        step = outlined(run, 2)
        ranks = {0: own._replace(following=lambda most: (steps, numbers)), 1: of_rank(chosen)}
        step.__dict__["_outlines"] = ranks
        found, of_ranks = step.series(16)
        assert list(found) == together
        assert [len(each) for each in of_ranks.values()] == [len(together)] * 2
        assert (of_ranks[1] - of_ranks[0] == 1).all()
