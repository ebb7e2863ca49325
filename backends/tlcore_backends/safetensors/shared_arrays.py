"""Arrays of indexes whose texts differ in places and hashes alone, as those of segments of alike steps do."""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from collections import deque
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from tlcore.errors import ReadError
from tlcore.hotpath.spans import decode_spans
from tlcore.layout.hashes import HASH_BYTES

from .array_places import Columns, Damaged, Place, Places

# Of an entry, what another segment has otherwise; each number is below `LARGEST`.
_VARIES = re.compile(
    rb'"offset":(0|[1-9][0-9]{0,14}),("constant":true,)?"hashes":"([A-Za-z0-9+/]*={0,2})"',
)
_PARTS = 1 + _VARIES.groups
_KEYS = (b'"offset"', b'"constant"', b'"hashes"')
_HASHES = _VARIES.groups
# Texts to compare others with, and their bytes in all.
_MOST_PATTERNS, _MOST_BYTES = 8, 8 << 20


class _Form:
    """What texts say alike whose entries have the same places: all but their hashes.

    ``columns`` are those of `Places`, and `layout` too, where they are known.
    """

    def __init__(self, offsets: list[int], constants: list[bool], counts: np.ndarray) -> None:
        self.offsets, self.constants, self.counts = offsets, constants, counts
        # Of all hashes, the first that each entry has.
        self.firsts = np.cumsum(counts) - counts
        self.columns: Columns | None = None
        self.layout: Hashable | None = None


class _Own(NamedTuple):
    """What the entries with bytes of their own have otherwise, in order."""

    form: _Form
    # Of each entry behind those of the one before.
    digests: bytes
    # As they are written, where that is not how their bytes are.
    hashes: Sequence[bytes] | None = None

    def digest(self, position: int) -> bytes:
        """The hashes of one entry."""
        begin = int(self.form.firsts[position]) * HASH_BYTES
        return self.digests[begin : begin + int(self.form.counts[position]) * HASH_BYTES]

    def written(self, position: int) -> str:
        """The same as its text has them."""
        if self.hashes is not None:
            return self.hashes[position].decode("ascii")
        return b2a_base64(self.digest(position), newline=False).decode("ascii")


def _own(parts: Sequence[bytes]) -> _Own | None:
    """Of a text that was divided; None where the hashes are not whole ones in base64."""
    hashes = list(parts[3::_PARTS])
    if any(len(text) % 4 for text in hashes):
        # Some decoders take what lacks its padding.
        return None
    digests = list(map(a2b_base64, hashes))
    sizes = np.fromiter(map(len, digests), np.int64, len(digests))
    if (sizes % HASH_BYTES).any():
        return None
    form = _Form(list(map(int, parts[1::_PARTS])), list(map(bool, parts[2::_PARTS])), sizes // HASH_BYTES)
    return _Own(form, b"".join(digests), hashes)


class _Pattern:
    """A text, and where its hashes stand: mostly another has them there, and differs in nothing else."""

    def __init__(self, text: bytes, form: _Form) -> None:
        self.nbytes, self._text, self._form = len(text), text, form
        spans = [match.span(_HASHES) for match in _VARIES.finditer(text)]
        self._places = np.array(spans, np.int64).reshape(-1, 2).tobytes()

    def of(self, text: memoryview) -> _Own | None:
        """What another text has so; None where it is of another kind."""
        digests = decode_spans(text, self._text, self._places)
        return None if digests is None else _Own(self._form, digests)


class ArraysText:
    """The text of a table of arrays, for those that differ in places and hashes alone."""

    def __init__(self, rest: Sequence[bytes], pattern: _Pattern, owners: np.ndarray, places: Places) -> None:
        self._rest = rest
        # Those of as many steps each have the same form.
        self._patterns = deque((pattern,), max(1, min(_MOST_PATTERNS, _MOST_BYTES // (pattern.nbytes + 1))))
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
        own.form.columns, own.form.layout = places.columns, places.layout
        return cls(parts[::_PARTS], _Pattern(text, own.form), owners, places)

    def arrays(self, text: memoryview, entries: Sequence[Any]) -> OwnArrays | None:
        """Those of another text; None where anything else differs. ``entries`` are those of this one."""
        found = (each.of(text) for each in list(self._patterns) if each.nbytes == len(text))
        own = next(filter(None, found), None)
        if own is None:
            copied = bytes(text)
            parts = _VARIES.split(copied)
            own = _own(parts) if parts[::_PARTS] == self._rest else None
            if own is not None:
                self._patterns.append(_Pattern(copied, own.form))
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
        found |= {"offset": own.form.offsets[position], "hashes": own.written(position)}
        return {**found, "constant": True} if own.form.constants[position] else found


class OwnPlaces(Places):
    """The places of such arrays: those of the others with some of their own."""

    def __init__(self, arrays: OwnArrays, damaged: Damaged) -> None:
        super().__init__(arrays, damaged)
        self._arrays = arrays

    def _find(self, number: int) -> Place:
        self._entry(number)
        own, position = self._arrays.own, self._arrays.owners[number]
        place = self._arrays.places.of(number)
        begin, constant = own.form.offsets[position], own.form.constants[position]
        return place._replace(begin=begin, constant=constant, hashes=own.digest(position))

    @cached_property
    def _told(self) -> tuple[Columns, np.ndarray]:
        form = self._arrays.own.form
        if form.columns is None:
            owners, others = self._arrays.owners, self._arrays.places.columns
            told = form.firsts, np.array(form.offsets, np.int64), np.array(form.constants, bool), form.counts
            first, begin, constant, counts = (each[owners] for each in told)
            form.columns = others._replace(begin=begin, constant=constant, first=first, counts=counts)
        return form.columns, np.frombuffer(self._arrays.own.digests, np.uint8).reshape(-1, HASH_BYTES)

    @property
    def layout(self) -> Hashable:
        """That of all that have the same form."""
        form = self._arrays.own.form
        if form.layout is None:
            form.layout = tuple(each.tobytes() for each in self.columns)
        return form.layout

    @cached_property
    def begins(self) -> dict[int, list[int]]:
        """Where the arrays of each data file begin, in order."""
        file, begin = self.columns.file, self.columns.begin
        return {each: sorted(set(begin[file == each].tolist())) for each in set(file.tolist())}

    @property
    def keys(self) -> dict[int, str]:
        """As those of the others."""
        return self._arrays.places.keys
