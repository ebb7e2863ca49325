"""Arrays of indexes whose texts differ in hashes alone, as those of segments of as many steps do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from tlcore.errors import ReadError

from .array_places import HASH_BYTES, Damaged, Place, Places

_HASHES = re.compile(rb'"hashes":"([A-Za-z0-9+/=]*)"')
_PAD, _NONE = 64, 65
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_VALUES = np.full(256, _NONE, np.uint8)
_VALUES[np.frombuffer(_LETTERS, np.uint8)] = np.arange(len(_LETTERS))
Bytes = np.ndarray


class ArraysText:
    """The text of a table of arrays, and what was found of it, for those that differ in hashes alone."""

    def __init__(self, text: bytes, spans: Sequence[tuple[int, int]], numbers: Sequence[int], places: Places):
        self._places = places
        self._spans = dict(zip(numbers, spans, strict=True))
        self._positions = np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, int)
        raw = np.frombuffer(text, np.uint8)
        values = _VALUES[raw[self._positions]]
        self._pads = values == _PAD
        self._used = _used(values, [end - begin for begin, end in spans])
        self._rest = self._without_hashes(raw)

    @classmethod
    def of(cls, text: bytes, entries: Sequence[Any], places: Places) -> ArraysText | None:
        """That of ``text``, of which ``entries`` were parsed; None where its hashes cannot be told apart."""
        spans = [found.span(1) for found in _HASHES.finditer(text)]
        numbers = [number for number, entry in enumerate(entries) if _has_hashes(entry)]
        # Without escapes a quote begins or ends a string: each of these is a key and its text, and there are
        # no others, in whatever depth.
        if b"\\" in text or not len(spans) == len(numbers) == text.count(b'"hashes"'):
            return None
        try:
            for number in range(len(entries)):
                places.of(number)
        except ReadError:
            return None
        if any((end - begin) % 4 for begin, end in spans):
            # Some decoders take what lacks its padding.
            return None
        if any(entries[number].get("same_as") is not None for number in numbers):
            # Its own are no one's.
            return None
        return cls(text, spans, numbers, places)

    def _without_hashes(self, raw: Bytes) -> Bytes:
        rest: Bytes = raw.copy()
        rest[self._positions] = 0
        return rest

    def arrays(self, text: bytes, entries: Sequence[Any]) -> OwnArrays | None:
        """Those of another text; None where more than hashes differs. ``entries`` are those of this one."""
        if len(text) != len(self._rest):
            return None
        raw = np.frombuffer(text, np.uint8)
        values = _VALUES[raw[self._positions]]
        if (values == _NONE).any() or not np.array_equal(values == _PAD, self._pads):
            return None
        if not np.array_equal(self._without_hashes(raw), self._rest):
            return None
        hashes = _decoded(values)[self._used].reshape(-1, HASH_BYTES)
        return OwnArrays(entries, text, self._spans, hashes, self._places)


def _has_hashes(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("hashes"), str)


def _decoded(values: Bytes) -> Bytes:
    """The bytes of base64, three of each four ``values``; those that stand for padding are anything."""
    four = values.reshape(-1, 4)
    three = four[:, :3] << np.array([2, 4, 6], np.uint8) | four[:, 1:] >> np.array([4, 2, 0], np.uint8)
    return three.reshape(-1)


def _used(values: Bytes, lengths: Sequence[int]) -> Bytes:
    """Which bytes of `_decoded` belong to whole hashes."""
    used = np.zeros(len(values) // 4 * 3, bool)
    begin = 0
    for length in lengths:
        padding = int(np.count_nonzero(values[begin : begin + length] == _PAD))
        count = (length // 4 * 3 - padding) // HASH_BYTES
        first = begin // 4 * 3
        used[first : first + count * HASH_BYTES] = True
        begin += length
    return used


class OwnArrays(Sequence[Any]):
    """The arrays of an index, made one by one: those of another with hashes of their own."""

    def __init__(
        self,
        entries: Sequence[Any],
        text: bytes,
        spans: dict[int, tuple[int, int]],
        hashes: Bytes,
        places: Places,
    ) -> None:
        self._entries = entries
        self._text = text
        self._spans = spans
        self.hashes = hashes
        self.places = places

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        entry = self._entries[index]
        span = self._spans.get(range(len(self))[index])
        return entry if span is None else {**entry, "hashes": self._text[slice(*span)].decode("ascii")}


class OwnPlaces(Places):
    """The places of such arrays: those of the others with hashes of their own."""

    def __init__(self, arrays: OwnArrays, damaged: Damaged) -> None:
        super().__init__(arrays, damaged)
        self._others = arrays.places
        self._own = arrays.hashes

    @property
    def firsts(self) -> Sequence[int]:
        """As those of the others."""
        return self._others.firsts

    @property
    def hashes(self) -> Bytes:
        """All hashes ``[n, 16]``, in order."""
        return self._own

    @cached_property
    def begins(self) -> dict[int, list[int]]:
        """As those of the others."""
        return self._others.begins

    def _find(self, number: int) -> Place:
        self._entry(number)
        place = self._others.of(number)
        first = self.firsts[number]
        count = len(place.hashes) // HASH_BYTES
        return place._replace(hashes=self._own[first : first + count].tobytes())
