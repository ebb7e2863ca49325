"""Which positions of a request are meant: all, the prompt, the response, or a range of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

# Where a prompt ends, and the response begins.
PROMPT: Final = "prompt"
End = int | Literal["prompt"] | None


@dataclass(frozen=True)
class Window:
    """The positions from ``begin`` to ``end`` (without it); None is a request's own begin or end.

    Negative ones count from the prompt's end, which ``"prompt"`` is itself.
    """

    begin: End = None
    end: End = None

    @property
    def needs_prompt(self) -> bool:
        """Whether one has to know how long a request's prompt is."""
        return any(each == PROMPT or (isinstance(each, int) and each < 0) for each in (self.begin, self.end))

    def part(self, first: int | None, length: int, prompt: int | None) -> tuple[int, int] | None:
        """Of ``length`` rows from position ``first`` on, how many to leave out before, and how many to take.

        None where it is not known: the rows have no positions, or the ``prompt``'s length is needed and not
        known.
        """
        if first is None or (prompt is None and self.needs_prompt):
            return None
        begin = first if self.begin is None else max(first, _place(self.begin, prompt or 0))
        end = first + length if self.end is None else min(first + length, _place(self.end, prompt or 0))
        return min(begin - first, length), max(0, end - begin)

    def to_json(self) -> Any:
        """As the configuration has it."""
        for name, each in NAMED.items():
            if each == self:
                return name
        ends = {"from": self.begin, "to": self.end}
        return {key: value for key, value in ends.items() if value is not None}


# What chooses rows of a batch, and what it says where all are captured.
_CHOICES: Final = {"rows": "all", "request_ids": None, "sample_rate": 1}


def row_choices(config: Mapping[str, Any]) -> str:
    """What in a run's configuration chose its rows, such as ``rows: last``; empty where it has all."""
    found = {key: config.get(key, whole) for key, whole in _CHOICES.items()}
    return ", ".join(
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in found.items()
        if value != _CHOICES[key]
    )


def _place(end: int | str, prompt: int) -> int:
    if isinstance(end, str):
        return prompt
    return end if end >= 0 else max(0, prompt + end)


NAMED: dict[str, Window] = {"all": Window(), "prompt": Window(None, PROMPT), "response": Window(PROMPT)}


def window_of(value: str | Mapping[str, Any]) -> Window:
    """The window that a name, or an object with ``from`` and ``to``, means.

    Raises ValueError, with the reason, for one that never holds a position, or any other value.
    """
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    if not isinstance(value, Mapping) or not value.keys() <= {"from", "to"}:
        known = ", ".join(f'"{name}"' for name in NAMED)
        raise ValueError(f'{value!r} names no rows; there are {known} and {{"from": a, "to": b}}')
    ends: list[Any] = [value.get("from"), value.get("to")]
    window = Window(*ends)
    for each in (window.begin, window.end):
        if not (each is None or each == PROMPT or type(each) is int):
            raise ValueError(f'{each!r} is no position; give a number or "prompt"')
    if _is_empty(window):
        begin, end = (json.dumps(each) for each in (window.begin or 0, window.end))
        raise ValueError(f"from {begin} to {end} there is no position")
    return window


def _is_empty(window: Window) -> bool:
    """Whether it holds no position, however long a prompt is."""
    begin, end = _from_prompt(window.begin or 0), None if window.end is None else _from_prompt(window.end)
    return end == (False, 0) or (end is not None and begin[0] == end[0] and begin[1] >= end[1])


def _from_prompt(end: int | str) -> tuple[bool, int]:
    """Whether an end counts from the prompt's, and how far from there."""
    return (True, 0) if isinstance(end, str) else (end < 0, end)
