"""Arrays of indexes whose texts differ in places and hashes alone, as those of segments of alike steps do."""

from __future__ import annotations

import re
import string
from binascii import a2b_base64
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from tlcore.errors import ReadError

from .array_places import HASH_BYTES, Columns, Damaged, Place, Places

# Of an entry, what another segment has otherwise; each number is below `LARGEST`.
_VARIES = re.compile(
    rb'"offset":(0|[1-9][0-9]{0,14}),("constant":true,)?"hashes":"([A-Za-z0-9+/]*={0,2})"',
)
_PARTS = 1 + _VARIES.groups
_KEYS = (b'"offset"', b'"constant"', b'"hashes"')
_HASHES = _VARIES.groups
_PADDING = ord("=")
_DIGITS = (string.ascii_letters + string.digits + "+/").encode()


class _Own(NamedTuple):
    """What the entries with bytes of their own have otherwise, in order."""

    offsets: list[int]
    constants: list[bool]
    hashes: list[bytes]
    digests: list[bytes]
    # Whether all but the hashes is as in the text that others are compared with.
    in_same_places: bool = False


def _own(parts: Sequence[bytes]) -> _Own | None:
    """Of a text that was divided; None where the hashes are not whole ones in base64."""
    hashes = list(parts[3::_PARTS])
    if any(len(text) % 4 for text in hashes):
        # Some decoders take what lacks its padding.
        return None
    digests = list(map(a2b_base64, hashes))
    if any(len(digest) % HASH_BYTES for digest in digests):
        return None
    return _Own(list(map(int, parts[1::_PARTS])), list(map(bool, parts[2::_PARTS])), hashes, digests)


class _Hashes:
    """Where the hashes stand in a text: mostly another has them there too, and differs in nothing else."""

    def __init__(self, text: bytes, own: _Own) -> None:
        self._text, self._own = np.frombuffer(text, np.uint8), own
        self._spans = [match.span(_HASHES) for match in _VARIES.finditer(text)]
        varies = np.zeros(len(text), bool)
        for begin, end in self._spans:
            varies[begin:end] = True
        self._places = np.flatnonzero(varies)
        self._hashes = self._text[self._places]
        self._padding = self._hashes == _PADDING

    def of(self, text: bytes) -> _Own | None:
        """What another text has so; None where it is of another kind."""
        if len(text) != len(self._text):
            return None
        there = np.frombuffer(text, np.uint8)
        hashes = there[self._places]
        padding = hashes == _PADDING
        # Decoding would pass over what is no digit.
        if (
            np.count_nonzero(there != self._text) > np.count_nonzero(hashes != self._hashes)
            or (padding != self._padding).any()
            or hashes[~padding].tobytes().translate(None, _DIGITS)
        ):
            return None
        texts = [text[begin:end] for begin, end in self._spans]
        return self._own._replace(hashes=texts, digests=list(map(a2b_base64, texts)), in_same_places=True)


class ArraysText:
    """The text of a table of arrays, for those that differ in places and hashes alone."""

    def __init__(self, rest: Sequence[bytes], hashes: _Hashes, owners: np.ndarray, places: Places) -> None:
        self._rest = rest
        self._hashes = hashes
        self._owners = owners
        self._places = places

    @classmethod
    def of(cls, text: bytes, entries: Sequence[Any], places: Places) -> ArraysText | None:
        """That of ``text``, of which ``entries`` were parsed; None where these cannot be told apart."""
        parts = _VARIES.split(text)
        numbers = [number for number, entry in enumerate(entries) if _has_hashes(entry)]
        constant = sum(each is not None for each in parts[2::_PARTS])
        # Without escapes a quote begins or ends a string: each of these is a key, and there are no others,
        # in whatever depth.
        expected = [len(numbers), constant, len(numbers)]
        if b"\\" in text or list(map(text.count, _KEYS)) != expected or len(parts) // _PARTS != len(numbers):
            return None
        try:
            for number in range(len(entries)):
                places.of(number)
        except ReadError:
            return None
        own = _own(parts)
        if own is None or any(entries[number].get("same_as") is not None for number in numbers):
            # Its own are no one's.
            return None
        positions = {number: position for position, number in enumerate(numbers)}
        stored = (entry.get("same_as", number) for number, entry in enumerate(entries))
        owners = np.array([positions[number] for number in stored], np.int64)
        return cls(parts[::_PARTS], _Hashes(text, own), owners, places)

    def arrays(self, text: bytes, entries: Sequence[Any]) -> OwnArrays | None:
        """Those of another text; None where anything else differs. ``entries`` are those of this one."""
        own = self._hashes.of(text)
        if own is None:
            parts = _VARIES.split(text)
            own = _own(parts) if parts[::_PARTS] == self._rest else None
        return None if own is None else OwnArrays(entries, own, self._owners, self._places)


def _has_hashes(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("hashes"), str)


class OwnArrays(Sequence[Any]):
    """The arrays of an index, made one by one: those of another with places and hashes of their own.

    ``owners`` says which of these each array has, or that which it is the same as.
    """

    def __init__(self, entries: Sequence[Any], own: _Own, owners: np.ndarray, places: Places) -> None:
        self._entries = entries
        self.own = own
        self.owners = owners
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
        if not _has_hashes(entry):
            return entry
        own, position = self.own, self.owners[index]
        found = {key: value for key, value in entry.items() if key != "constant"}
        found |= {"offset": own.offsets[position], "hashes": own.hashes[position].decode("ascii")}
        return {**found, "constant": True} if own.constants[position] else found


class OwnPlaces(Places):
    """The places of such arrays: those of the others with some of their own."""

    def __init__(self, arrays: OwnArrays, damaged: Damaged) -> None:
        super().__init__(arrays, damaged)
        self._arrays = arrays

    def _find(self, number: int) -> Place:
        self._entry(number)
        own, position = self._arrays.own, self._arrays.owners[number]
        place = self._arrays.places.of(number)
        return place._replace(
            begin=own.offsets[position], constant=own.constants[position], hashes=own.digests[position]
        )

    @cached_property
    def _told(self) -> tuple[Columns, np.ndarray]:
        own, others = self._arrays.own, self._arrays.places.columns
        hashes = np.frombuffer(b"".join(own.digests), np.uint8).reshape(-1, HASH_BYTES)
        if own.in_same_places:
            return others, hashes
        counts = np.fromiter(map(len, own.digests), np.int64, len(own.digests)) // HASH_BYTES
        owners = self._arrays.owners
        told = np.cumsum(counts) - counts, np.array(own.offsets, np.int64), np.array(own.constants, bool)
        first, begin, constant = (each[owners] for each in told)
        columns = others._replace(begin=begin, constant=constant, first=first, counts=counts[owners])
        return columns, hashes

    @cached_property
    def layout(self) -> Hashable:
        """That of the others where it is the same."""
        if self._arrays.own.in_same_places:
            return self._arrays.places.layout
        return tuple(each.tobytes() for each in self.columns)

    @cached_property
    def begins(self) -> dict[int, list[int]]:
        """Where the arrays of each data file begin, in order."""
        file, begin = self.columns.file, self.columns.begin
        return {each: sorted(set(begin[file == each].tolist())) for each in set(file.tolist())}

    @property
    def keys(self) -> dict[int, str]:
        """As those of the others."""
        return self._arrays.places.keys
