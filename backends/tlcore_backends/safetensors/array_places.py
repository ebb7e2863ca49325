"""Where the arrays of a segment lie, as its index says, and which of their rows each step has."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, overload

import numpy as np

from tlcore.errors import ReadError
from tlcore.layout.dtypes import item_size
from tlcore.layout.hashes import HASH_BYTES
from tlcore.protocols import ArrayRows
from tlcore.record import Json

LARGEST = 1 << 50
# What an array's entry says beside what is a record's, and what only the step tells.
PLACE_KEYS = frozenset(("key", "file", "offset", "constant", "same_as", "hashes", "alias_of"))
_MOST_DIMENSIONS = 64
_NOWHERE = -1

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


class Columns(NamedTuple):
    """The places of all arrays ``[n]``, ``file`` -1 of one that makes no sense.

    Of `Places.hashes` each has ``counts`` from ``first`` on. ``row_bytes`` end one above `LARGEST`.
    """

    file: np.ndarray
    begin: np.ndarray
    constant: np.ndarray
    row_bytes: np.ndarray
    first: np.ndarray
    counts: np.ndarray


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
        begin = 0 if place.constant else occurrence * HASH_BYTES
        digest = place.hashes[begin : begin + HASH_BYTES]
        if len(digest) != HASH_BYTES:
            raise self._damaged(f"array {array} has too few hashes")
        return digest.hex()

    @property
    def columns(self) -> Columns:
        """The places of all arrays."""
        return self._told[0]

    @property
    def hashes(self) -> np.ndarray:
        """The hashes ``[n, 16]`` of all arrays that make sense, in order."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[Columns, np.ndarray]:
        rows, owners, digests, total = list[tuple[int, ...]](), list[int](), list[bytes](), 0
        for number in range(len(self._entries)):
            owners.append(number)
            try:
                place = self.of(number)
            except ReadError:
                rows.append((_NOWHERE, 0, 0, 0, 0, 0))
                continue
            # As many as no file has room for, where it is more.
            row_bytes, count = min(place.row_bytes, LARGEST + 1), len(place.hashes) // HASH_BYTES
            rows.append((place.file, place.begin, place.constant, row_bytes, total, count))
            other = self._entries[number].get("same_as")
            if other is None:
                digests.append(place.hashes[: count * HASH_BYTES])
                total += count
            else:
                owners[number] = other
        file, begin, constant, width, first, counts = np.array(rows, np.int64).reshape(-1, 6).T
        columns = Columns(file, begin, constant.astype(bool), width, first[owners], counts)
        return columns, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, HASH_BYTES)

    @cached_property
    def layout(self) -> Hashable:
        """Equal for arrays that lie in the same places of the files, of entries that are alike otherwise."""
        return tuple(each.tobytes() for each in self.columns)

    @cached_property
    def keys(self) -> dict[int, str]:
        """The keys, in their files, of the arrays that have bytes of their own. Raises ReadError."""
        found: dict[int, str] = {}
        for number, entry in enumerate(self._entries):
            self.of(number)
            if entry.get("same_as") is None:
                found[number] = entry.get("key", entry["name"])
                if not isinstance(found[number], str):
                    raise self._damaged(f"array {number} has no key")
        return found

    @cached_property
    def begins(self) -> dict[int, list[int]]:
        """Where the arrays of each data file begin, in order."""
        found: dict[int, set[int]] = {}
        for entry in self._entries:
            file, offset = (
                (entry.get("file"), entry.get("offset")) if isinstance(entry, dict) else (None, None)
            )
            if type(file) is int and type(offset) is int:
                found.setdefault(file, set()).add(offset)
        return {file: sorted(offsets) for file, offsets in found.items()}

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
        if entry.get("same_as") is not None:
            return self._same(number, entry, number_of(entry["same_as"], self._damaged))
        hashes = entry.get("hashes")
        try:
            digests = base64.b64decode(hashes, validate=True) if isinstance(hashes, str) else None
        except (binascii.Error, ValueError):
            digests = None
        if digests is None:
            raise self._damaged(f"the hashes of array {number} are not in base64")
        return Place(
            number_of(entry.get("file"), self._damaged),
            number_of(entry.get("offset"), self._damaged),
            entry.get("constant") is True,
            digests,
            row,
            prod(row) * width,
            str(entry["dtype"]),
            not shape,
        )

    def _same(self, number: int, entry: Json, other: int) -> Place:
        """The place of another array, which has the hashes only once however many are the same."""
        stored = self._entry(other)
        if not isinstance(stored, dict) or stored.get("same_as") is not None:
            raise self._damaged(f"array {number} is the same as one that has no bytes")
        place = self.of(other)
        # Earlier writers took the arrays of a number and of a vector of one for the same.
        if place.dtype != entry["dtype"] or list(place.row) != entry["shape"][1:]:
            raise self._damaged(f"array {number} is the same as one of another form")
        scalar = not entry["shape"]
        return place if place.scalar is scalar else place._replace(scalar=scalar)


class ArrayOfRows(Sequence[ArrayRows]):
    """Which rows of an array each step has; looked up when one is asked for, since reading needs none.

    The array's bytes are ``[place.begin, end)`` of ``file``, those of one step where it is constant.
    """

    def __init__(
        self,
        file: str,
        place: Place,
        end: int,
        times: int,
        find: Callable[[], list[ArrayRows]],
        begins: Callable[[], dict[int, int]],
    ) -> None:
        self.file = file
        self.place = place
        self.end = end
        self._times = times
        self._find = find
        self.begins = begins
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
    for value in values:
        # An index has many; a call for each takes longer than looking at it.
        if type(value) is not int or not 0 <= value <= most:
            number_of(value, damaged, most)
    return list(values)
