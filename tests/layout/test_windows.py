"""Windows: which positions of a request are meant, and what of a range of rows is in them."""

from __future__ import annotations

from typing import Any

import pytest

from tlcore.layout.windows import Window, window_of

# Every position of a request whose prompt has so many.
CASES: list[tuple[Any, int, list[int]]] = [
    ("all", 3, [0, 1, 2, 3, 4, 5]),
    ("prompt", 3, [0, 1, 2]),
    ("response", 3, [3, 4, 5]),
    ({"from": 1, "to": 4}, 3, [1, 2, 3]),
    ({"from": -1, "to": "prompt"}, 3, [2]),
    ({"from": -2}, 3, [1, 2, 3, 4, 5]),
    ({"to": -1}, 3, [0, 1]),
    ({"from": -9, "to": "prompt"}, 3, [0, 1, 2]),
    ({"to": -9}, 3, []),
    ({"from": "prompt", "to": 5}, 3, [3, 4]),
    ({"from": "prompt", "to": 5}, 8, []),
    ({"from": 4}, 3, [4, 5]),
]


@pytest.mark.parametrize(("value", "prompt", "positions"), CASES)
@pytest.mark.parametrize("cut", range(7))
def test_a_window_takes_the_same_positions_however_the_rows_are_cut(
    value: Any, prompt: int, positions: list[int], cut: int
) -> None:
    window = window_of(value)
    found: list[int] = []
    for first, length in ((0, cut), (cut, 6 - cut)):
        part = window.part(first, length, prompt)
        assert part is not None
        skipped, count = part
        assert skipped >= 0 and count >= 0 and skipped + count <= length
        found += range(first + skipped, first + skipped + count)
    assert found == positions
    assert window_of(window.to_json()) == window


def test_what_is_not_known_is_in_no_window() -> None:
    assert window_of("prompt").part(0, 3, None) is None
    assert window_of({"from": -1}).part(0, 3, None) is None
    assert window_of("all").part(None, 3, 4) is None
    assert window_of({"from": 1, "to": 2}).part(0, 3, None) == (1, 1)


@pytest.mark.parametrize(
    "value",
    [
        *({"from": 3, "to": 3}, {"from": -1, "to": -2}, {"to": 0}, {"from": "prompt", "to": "prompt"}),
        *({"from": "prompt", "to": -1}, {"from": 1, "until": 2}, {"from": 1.5}, "first", {"from": True}),
    ],
)
def test_a_window_that_never_holds_anything_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"no position|names no rows"):
        window_of(value)


def test_the_default_is_everything() -> None:
    assert window_of("all") == Window() and not Window().needs_prompt
