"""Where the arrays of a segment lie, as its index says, and which of their rows each step has."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, overload

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.protocols import ArrayRows

LARGEST = 1 << 50
# What an array's entry says beside what is a record's.
PLACE_KEYS = frozenset(("key", "file", "offset", "constant", "same_as", "hashes"))
_HASH_BYTES = 16
_MOST_DIMENSIONS = 64

# The error for an index that makes no sense.
Damaged = Callable[[str], ReadError]


class Place(NamedTuple):
    """Where an array's bytes lie: ``file`` of the index, from ``begin`` on, ``row_bytes`` a row."""

    file: int
    begin: int
    constant: bool
    hashes: bytes
    row: tuple[int, ...]
    row_bytes: int
    dtype: str
    scalar: bool


class Places:
    """The places of an index's arrays by number; ``entries`` are the index's, from anybody."""

    def __init__(self, entries: Sequence[Any], damaged: Damaged) -> None:
        self._entries = entries
        self._damaged = damaged
        self._known: dict[int, Place] = {}

    def of(self, number: int) -> Place:
        """The place of an array. Raises ReadError."""
        known = self._known.get(number)
        if known is None:
            known = self._known[number] = self._find(number)
        return known

    def hash(self, array: int, occurrence: int) -> str:
        """The hash, in hex, of the tensor that an array has from the step where it occurs so often before."""
        place = self.of(array)
        begin = 0 if place.constant else occurrence * _HASH_BYTES
        digest = place.hashes[begin : begin + _HASH_BYTES]
        if len(digest) != _HASH_BYTES:
            raise self._damaged(f"array {array} has too few hashes")
        return digest.hex()

    def begins(self, file: int) -> list[int]:
        """Where the arrays of a data file begin, in order."""
        offsets = (
            entry.get("offset")
            for entry in self._entries
            if isinstance(entry, dict) and entry.get("file") == file
        )
        return sorted(offset for offset in offsets if type(offset) is int)

    def _entry(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self._entries):
            raise self._damaged(f"'arrays' has no entry {str(number)[:40]}")
        return self._entries[number]

    def _find(self, number: int) -> Place:
        entry = self._entry(number)
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise self._damaged(f"array {number} has no name")
        shape = entry.get("shape")
        width = item_size(entry.get("dtype"))
        if not isinstance(shape, list) or width is None or len(shape) > _MOST_DIMENSIONS:
            raise self._damaged(f"array {number} has no dtype or shape")
        row = tuple(numbers_of(shape[1:], self._damaged))
        stored = entry
        if entry.get("same_as") is not None:
            stored = self._entry(number_of(entry["same_as"], self._damaged))
            if not isinstance(stored, dict) or stored.get("same_as") is not None:
                raise self._damaged(f"array {number} is the same as one that has no bytes")
            if stored.get("dtype") != entry["dtype"] or stored.get("shape") != shape:
                raise self._damaged(f"array {number} is the same as one of another form")
        try:
            hashes = base64.b64decode(str(stored.get("hashes")), validate=True)
        except (binascii.Error, ValueError):
            raise self._damaged(f"the hashes of array {number} are not in base64") from None
        return Place(
            number_of(stored.get("file"), self._damaged),
            number_of(stored.get("offset"), self._damaged),
            stored.get("constant") is True,
            hashes,
            row,
            prod(row) * width,
            str(entry["dtype"]),
            not shape,
        )


class ArrayOfRows(Sequence[ArrayRows]):
    """Which rows of an array each step has; looked up when one is asked for, since reading needs none.

    The array's bytes are ``[place.begin, end)`` of ``file``, those of one step where it is constant.
    """

    def __init__(
        self, file: str, place: Place, end: int, times: int, find: Callable[[], list[ArrayRows]]
    ) -> None:
        self.file = file
        self.place = place
        self.end = end
        self._times = times
        self._find = find
        self._found: list[ArrayRows] | None = None

    def __len__(self) -> int:
        return self._times

    @overload
    def __getitem__(self, index: int) -> ArrayRows: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ArrayRows]: ...

    def __getitem__(self, index: int | slice) -> ArrayRows | Sequence[ArrayRows]:
        if self._found is None:
            self._found = self._find()
        return self._found[index]


def number_of(value: Any, damaged: Damaged, most: int = LARGEST) -> int:
    """A number of an index that came from anybody. Raises ReadError for anything else."""
    if type(value) is not int or not 0 <= value <= most:
        raise damaged(f"{str(value)[:40]!r} is no number that fits")
    return value


def numbers_of(values: Any, damaged: Damaged, most: int = LARGEST) -> list[int]:
    """A list of such numbers."""
    if not isinstance(values, list):
        raise damaged("something is no list of numbers")
    return [number_of(value, damaged, most) for value in values]
