"""Room on the interpreter's stack: added while a model is captured, whoever else sets the limit meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tlcore.engine.hooks.stack_room import StackRoom


@pytest.fixture
def limit() -> Iterator[int]:
    """The limit before, which is there again afterwards."""
    before = sys.getrecursionlimit()
    yield before
    sys.setrecursionlimit(before)


def test_room_is_made_once_and_given_back(limit: int) -> None:
    room = StackRoom()
    room.take(10)
    raised = sys.getrecursionlimit()
    room.take(10)
    assert raised == sys.getrecursionlimit() > limit
    room.take(20)
    assert sys.getrecursionlimit() > raised
    room.give_back()
    room.give_back()
    assert sys.getrecursionlimit() == limit


def test_two_have_room_beside_each_other(limit: int) -> None:
    first, second = StackRoom(), StackRoom()
    first.take(10)
    second.take(30)
    both = sys.getrecursionlimit()
    first.take(10)
    assert sys.getrecursionlimit() == both
    first.give_back()
    assert limit < sys.getrecursionlimit() < both
    second.give_back()
    assert sys.getrecursionlimit() == limit


def test_a_limit_that_somebody_sets_meanwhile_holds(limit: int) -> None:
    first, second = StackRoom(), StackRoom()
    first.take(10)
    second.take(30)
    sys.setrecursionlimit(limit + 5000)
    first.take(10)
    assert sys.getrecursionlimit() > limit + 5000
    second.give_back()
    assert sys.getrecursionlimit() > limit + 5000
    second.take(30)
    for each in (second, first):
        each.give_back()
    assert sys.getrecursionlimit() == limit + 5000
