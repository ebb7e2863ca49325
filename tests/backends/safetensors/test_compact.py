"""What an index says once: values apart from their integers."""

from __future__ import annotations

import random
from typing import Any

from tlcore_backends.safetensors.compact import Splitter, joined, listed, split

VALUES: list[Any] = [0, 1, -7, 1 << 70, True, False, 0.0, 1.0, "", "a", "0", None, [1, 2], [1, "b"], {"c": 3}]


def test_what_comes_again_is_split_as_for_the_first_time() -> None:
    """One splitter is asked for many objects, among them such as Python takes for equal."""
    chance = random.Random(0)
    splitter = Splitter()
    for _ in range(3000):
        value = {key: chance.choice(VALUES) for key in chance.sample("abc", chance.randint(0, 3))}
        text, numbers = splitter.split(value)
        assert (text, numbers) == split(value)
        assert all(type(number) is int for number in numbers)


def test_a_value_is_what_was_split() -> None:
    value = {"a": [1, 2.5, [True, 3]], "b": {"c": [], "d": (4, 5)}, "e": [6, 7], "f": "8"}
    text, numbers = split(value)
    assert text == '{"a":[0,2.5,[true,0]],"b":{"c":[],"d":[0,0]},"e":[0,0],"f":"8"}'
    assert numbers == [1, 3, 4, 5, 6, 7]
    form = {"a": [0, 2.5, [True, 0]], "b": {"c": [], "d": [0, 0]}, "e": [0, 0], "f": "8"}
    assert joined(form, iter(numbers)) == {**value, "b": {"c": [], "d": [4, 5]}}
    assert listed(numbers) == "[1,3,4,5,6,7]"
