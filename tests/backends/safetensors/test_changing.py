"""Values told as differences: those of steps that follow one another are told together, as one by one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tlcore.errors import ReadError
from tlcore_backends.safetensors.changing import Changing

_SKELETONS: list[Any] = [{"a": 0, "ids": [0, 0, 0]}, {"b": 0}, {"c": 0, "text": "x"}]
_INTEGERS = [4, 1, 1]
Pairs = list[tuple[Any, Any]]


def _changing(changes: list[Any]) -> Changing:
    tables = {"skeletons": _SKELETONS, "changes": changes}
    return Changing(lambda table, number: tables[table][number], ReadError)


def _steps(seed: int, changes: list[Any]) -> list[Pairs]:
    """Stretches of steps of one kind each, with what they need of ``changes``."""
    draw = random.Random(seed)
    steps: list[Pairs] = []
    while len(steps) < 30:
        skeletons = draw.sample(range(3), draw.randint(1, 3))
        for _ in range(draw.randint(1, 9)):
            pairs: Pairs = []
            for skeleton in skeletons:
                count = _INTEGERS[skeleton]
                places = sorted(draw.sample(range(count), draw.randint(0, count)))
                changes.append([part for place in places for part in (place, draw.randint(-5, 1 << 20))])
                pairs.append((skeleton, len(changes) - 1))
            steps += [pairs] * draw.randint(1, 3)
    return steps


def _told(changing: Changing, steps: list[Pairs], at: int) -> list[int]:
    return [number for each in changing.told(at, steps.__getitem__) for number in each.numbers]


@pytest.mark.parametrize("seed", range(20))
def test_steps_that_follow_are_told_as_one_by_one(seed: int) -> None:
    changes: list[Any] = []
    steps = _steps(seed, changes)
    changing, plain = _changing(changes), _changing(changes)
    draw, at, together = random.Random(seed), 0, 0
    while at < len(steps):
        assert _told(changing, steps, at) == _told(plain, steps, at)
        skeletons = [skeleton for skeleton, _ in steps[at]]
        end = at + 1
        while end < len(steps) and [skeleton for skeleton, _ in steps[end]] == skeletons:
            end += 1
        numbers, turn = changing.ahead(at + 1, steps[at + 1 : end])
        assert len(numbers) == end - at - 1
        # Some are left for later.
        taken = numbers[: draw.randint(0, len(numbers))]
        for later, own in enumerate(taken.tolist(), at + 1):
            assert own == _told(plain, steps, later)
        if len(taken):
            changing.went(turn, at + 1 + len(taken), skeletons, taken[-1])
        at, together = at + 1 + len(taken), together + len(taken)
    assert together > 3


def test_what_is_asked_for_meanwhile_is_told_as_ever() -> None:
    changes: list[Any] = [[0, 5], [0, 1]]
    steps: list[Pairs] = [[(1, 0)], *([[(1, 1)]] * 5)]
    changing = _changing(changes)
    assert _told(changing, steps, 1) == [6]
    numbers, turn = changing.ahead(2, steps[2:4])
    assert numbers.tolist() == [[7], [8]]
    # Another thread reads the first step.
    assert _told(changing, steps, 0) == [5]
    assert not len(changing.ahead(2, steps[2:4])[0])
    changing.went(turn, 4, [1], numbers[-1])
    assert [_told(changing, steps, at) for at in (1, 4, 5)] == [[6], [9], [10]]


@pytest.mark.parametrize(
    "change", [[4, 1], [0, 1.5], [0], "x", [0, 1, 0, 1], [0, 1 << 50], [0, 1 << 70], [0, True], None]
)
def test_a_change_that_makes_no_sense_or_is_large_is_left_to_who_asks_for_its_step(change: Any) -> None:
    changes: list[Any] = [[0, 5], [0, 1], change]
    steps: list[Pairs] = [[(1, 0)], [(1, 1)], [(1, 2)], [(1, 1)]]
    changing, plain = _changing(changes), _changing(changes)
    assert _told(changing, steps, 0) == [5]
    numbers, turn = changing.ahead(1, steps[1:])
    assert numbers.tolist() == [[6]]
    changing.went(turn, 2, [1], numbers[-1])
    large = isinstance(change, list) and change[0] == 0 and change[1:] in ([1 << 50], [1 << 70])
    try:
        assert _told(changing, steps, 2) == [6 + change[1]] and large
    except ReadError as error:
        with pytest.raises(ReadError, match=str(error)):
            _told(plain, steps, 2)
        assert not large


@pytest.mark.parametrize("number", [True, [1], 1.0])
def test_a_change_that_is_no_number_is_not_taken_for_one(number: Any) -> None:
    changing = _changing([[0, 5], [0, 1]])
    _told(changing, [[(1, 0)]], 0)
    assert not len(changing.ahead(1, [[(1, number)]])[0])


def test_a_skeleton_that_stands_twice_is_told_one_by_one() -> None:
    steps: list[Pairs] = [[(1, 0), (1, 1)], [(1, 1), (1, 1)]]
    changing = _changing([[0, 5], [0, 1]])
    assert _told(changing, steps, 0) == [5, 6]
    assert not len(changing.ahead(1, steps[1:])[0])
    assert _told(changing, steps, 1) == [7, 8]


def test_large_numbers_never_wrap() -> None:
    changes: list[Any] = [[0, (1 << 60) + 1], [0, 1 << 44]]
    steps: list[Pairs] = [[(1, 0)], [(1, 1)]]
    changing = _changing(changes)
    assert _told(changing, steps, 0) == [(1 << 60) + 1]
    assert not len(changing.ahead(1, steps[1:])[0])
    changes[0] = [0, 1 << 60]
    changing = _changing(changes)
    assert _told(changing, steps, 0) == [1 << 60]
    numbers, _ = changing.ahead(1, [steps[1]] * (1 << 14))
    assert int(numbers[-1, 0]) == (1 << 60) + (1 << 58) and bool((np.diff(numbers[:, 0]) == 1 << 44).all())
