"""How an index says things once: tables of texts, runs of numbers, and values of which only numbers change.

`docs/` of the format: ``schemas/tlcore_schemas/segments.md``.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from tlcore.layout.templates import compact

from .skeletons import CONSTANT

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class Table:
    """JSON texts, each once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[Hashable, int] = {}
        self.nbytes = 0

    def number(self, text: str) -> int:
        """The number of a text, which is added if it is new."""
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self.texts)
            self.texts.append(text)
            self.nbytes += len(text) + 1
        return number

    def copy(self) -> Table:
        """Another table that has the same texts so far."""
        other = Table()
        other.texts, other._numbers, other.nbytes = self.texts.copy(), self._numbers.copy(), self.nbytes
        return other

    def text(self) -> str:
        """The whole table as a JSON array."""
        return f"[{','.join(self.texts)}]"


def runs(numbers: Iterable[int]) -> list[int]:
    """``[5, 6, 7, 2]`` as ``[5, 3, 2, 1]``: where each run of consecutive numbers begins, and its length."""
    found: list[int] = []
    expected = None
    for number in numbers:
        if number == expected:
            found[-1] += 1
        else:
            found += (number, 1)
        expected = number + 1
    return found


def repeats(numbers: Iterable[int]) -> list[int]:
    """``[5, 5, 5, 2]`` as ``[5, 3, 2, 1]``: each number and how often it follows itself."""
    found: list[int] = []
    for number, group in itertools.groupby(numbers):
        found += (number, sum(1 for _ in group))
    return found


def split(value: Any) -> tuple[str, list[int]]:
    """A JSON value's text with each integer written as 0, and the integers in order."""
    numbers: list[int] = []
    return compact(_zeroed(value, numbers)), numbers


def _zeroed(value: Any, numbers: list[int]) -> Any:
    if type(value) is int:
        numbers.append(value)
        return 0
    if isinstance(value, dict):
        zeroed: dict[str, Any] = {}
        for key, item in value.items():
            # Nearly all are numbers and texts; a call for each of them is most of the work.
            if type(item) is int:
                numbers.append(item)
                zeroed[key] = 0
            else:
                zeroed[key] = item if type(item) is str else _zeroed(item, numbers)
        return zeroed
    if isinstance(value, (list, tuple)):
        if all(type(item) is int for item in value):
            numbers += value
            return [0] * len(value)
        return [_zeroed(item, numbers) for item in value]
    return value


class Splitter:
    """`split` for flat objects that come again in every step with other numbers, such as requests' rows."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str | int | None, ...], str] = {}

    def split(self, value: Mapping[str, Any]) -> tuple[str, list[int]]:
        """What `split` says."""
        form: list[str | int | None] = list(value)
        numbers: list[int] = []
        for item in value.values():
            if type(item) is int:
                numbers.append(item)
                form.append(0)
            elif item is None or type(item) is str:
                form.append(item)
            else:
                # Where true and 1.0 stood, they would be taken for 1.
                return split(value)
        key = tuple(form)
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = split(value)[0]
        return text, numbers


def joined(skeleton: Any, numbers: Iterator[int]) -> Any:
    """The value that `split` took apart; ``numbers`` gives its integers."""
    if type(skeleton) is int:
        return next(numbers)
    if isinstance(skeleton, dict):
        return {key: joined(item, numbers) for key, item in skeleton.items()}
    if isinstance(skeleton, list):
        types = list(map(type, skeleton))
        if types.count(int) == len(skeleton):
            return list(itertools.islice(numbers, len(skeleton)))
        if CONSTANT.issuperset(types):
            return skeleton[:]
        return [joined(item, numbers) for item in skeleton]
    return skeleton


def listed(numbers: Iterable[int]) -> str:
    """Numbers as a JSON array."""
    return f"[{','.join(map(str, numbers))}]"


def sparse(numbers: Sequence[int]) -> list[int]:
    """``[0, 7, 0, 1]`` as ``[1, 7, 3, 1]``: the place and the value of each number that is not 0."""
    return [part for place, number in enumerate(numbers) if number for part in (place, number)]


class Changing:
    """Values whose integers are told as differences to those of the last value with the same skeleton."""

    def __init__(self, skeletons: Table, deltas: Table) -> None:
        self._skeletons = skeletons
        self._deltas = deltas
        # The integers that came last, by skeleton.
        self.last: dict[int, list[int]] = {}

    def told(self, text: str, numbers: list[int]) -> tuple[int, int]:
        """The numbers of the skeleton and of the differences of a value that was `split`."""
        skeleton = self._skeletons.number(text)
        last = self.last.get(skeleton)
        changes = numbers if last is None else [new - old for new, old in zip(numbers, last, strict=True)]
        self.last[skeleton] = numbers
        return skeleton, self._deltas.number(listed(sparse(changes)))


def microseconds(text: str) -> int | None:
    """A time as microseconds since 1970; None for one that is not written as `time_text` writes it."""
    try:
        value = (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND
    except (ValueError, TypeError):
        return None
    return value if time_text(value) == text else None


def time_text(value: int) -> str:
    """Microseconds since 1970 as ISO 8601 in UTC, always with six digits of a second.

    Raises OverflowError for a time that a calendar does not have.
    """
    return (_EPOCH + value * _MICROSECOND).isoformat(timespec="microseconds")
