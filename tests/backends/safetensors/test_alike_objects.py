"""What indexes say of requests at once is what they would say of each."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.deep import scaled
from tlcore_backends.safetensors.alike_objects import AlikeObjects, Details, RowLists
from tlcore_backends.safetensors.compact import Changing, Splitter, Table, listed, split

OTHERS: list[Any] = [True, 1.5, None, "x", [], [1], [1, 2], ["a"], [True], {}, {"a": 1}, -3, 1 << 70]


def row(chance: random.Random, name: str, step: int) -> dict[str, Any]:
    """A request's row, mostly one further than in the step before."""
    found: dict[str, Any] = {"request_id": name, "external_request_id": None, "first_row": 3, "rows": 1}
    found["first_position"] = step if chance.random() < 0.98 else chance.randrange(100)
    if chance.random() < 0.02:
        found[chance.choice(["drafts", "rows", "more"])] = chance.choice(OTHERS)
    return found


def steps(seed: int, count: int) -> list[list[Any]]:
    """The rows of steps whose requests seldom change."""
    chance = random.Random(seed)
    names, found = ["a", "b", "c"], []
    for step in range(count):
        if chance.random() < 0.1:
            names = [chance.choice("abcdef") for _ in range(chance.randrange(5))]
        found.append([row(chance, name, step) for name in names])
    return found


class Plain:
    """Row lists told row by row."""

    def __init__(self) -> None:
        self.tables = [Table(), Table(), Table()]
        self._rows = Changing(*self.tables[:2])

    def told(self, rows: list[Any]) -> int:
        """The number of a list."""
        parts = [part for each in map(Splitter().split, rows) for part in self._rows.told(*each)]
        return self.tables[2].number(listed(parts))


@pytest.mark.parametrize("seed", range(scaled(20, 500)))
def test_lists_of_rows_are_told_as_row_by_row(seed: int) -> None:
    plain, tables = Plain(), [Table(), Table(), Table()]
    lists, chance = RowLists(*tables), random.Random(seed)
    for rows in steps(seed, 60):
        if chance.random() < 0.1:
            # A step that is refused afterwards leaves nothing.
            lists.take([row(chance, name, chance.randrange(9)) for name in "abc"[: len(rows)]])
        lists.take(rows)
        assert lists.told() == plain.told(rows)
    assert [table.texts for table in tables] == [table.texts for table in plain.tables]


def test_steady_rows_are_not_looked_at_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = RowLists(Table(), Table(), Table())
    numbers = []
    for step in range(9):
        lists.take([{"request_id": name, "first_position": step} for name in "abcd"])
        numbers.append(lists.told())
        if step == 2:
            monkeypatch.setattr(Changing, "told", None)
    assert len(set(numbers[2:])) == 1


@pytest.mark.parametrize("seed", range(scaled(20, 500)))
def test_details_are_split_as_a_whole(seed: int) -> None:
    details, chance = Details(), random.Random(seed)
    for step, rows in enumerate(steps(seed, 40)):
        tokens = [
            {"request_id": each["request_id"], "prompt": 5, "first_position": step, "ids": [step * 7 % 50]}
            for each in rows
        ]
        if tokens and chance.random() < 0.1:
            tokens[-1][chance.choice(["ids", "prompt", "more"])] = chance.choice(OTHERS)
        extra: Any = {"tokens": tokens, "call_rows": rows, "padded_rows": step}
        if chance.random() < 0.05:
            extra = chance.choice([{}, {7: 1, "tokens": tokens}, {"tokens": [[1, 2], {"a": 1}]}])
        whole = {"ledger": {"captured": step, "reasons": {}}, "extra": extra, "started": "x"}
        assert details.split(whole) == split(whole)


def test_what_is_refused_is_refused_again() -> None:
    objects = AlikeObjects()
    assert objects.split([{"a": 1}]) == ('[{"a":0}]', [1])
    for _ in range(2):
        with pytest.raises(TypeError):
            objects.split([{(1, 2): 3}])
    assert objects.split([{"a": 4}]) == ('[{"a":0}]', [4])


def test_what_cannot_be_alike_leaves_nothing_to_compare_with() -> None:
    objects = AlikeObjects()
    steps_of: list[list[Any]] = [[{"a": [1]}], [{"a": 1.5}], [{}, {}], [{"b": {"q": 1}}], [{}]]
    for given in steps_of:
        assert objects.split(given) == split(given)
