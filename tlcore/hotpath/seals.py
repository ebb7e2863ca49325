"""The checksums in what is around a payload: filled in, or found to be there, for many at once."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .native import can_check, extension

_NUMBERS = struct.Struct("=5q3qQQ3q3q")
ROW_BYTES = _NUMBERS.size
_DIGITS = 20
_WORD = 0xFFFFFFFFFFFFFFFF
_NOWHERE = -1


class Seal(NamedTuple):
    """Which checksums stand where in a text.

    ``of_data`` are the places of the CRC-32 of the data that the text is for, at most three. ``mixed`` is a
    mix of checksums so far; the data's, where there are any, and ``last`` are mixed in, and the result stands
    at ``digits`` in twenty decimal digits. The CRC-32 of ``[begin, end)`` of the text stands at ``of_range``.
    """

    of_data: tuple[int, ...]
    mixed: int
    last: int
    digits: int
    begin: int
    end: int
    of_range: tuple[int, ...]

    def row(self, size: int, template_at: int = 0, at: int = 0, begin: int = 0, end: int = 0) -> bytes:
        """What `seal` takes for a text of ``size`` bytes whose template lies at ``template_at``.

        It is put at ``at``, and ``[begin, end)`` are its data; the first are the row's first numbers.
        """
        nowhere = (_NOWHERE,) * 3
        of_data, of_range = (*self.of_data, *nowhere)[:3], (*self.of_range, *nowhere)[:3]
        own = *of_data, self.mixed, self.last, self.digits, self.begin, self.end, *of_range
        return _NUMBERS.pack(at, template_at, size, begin, end, *own)


class _Row(NamedTuple):
    at: int
    template_at: int
    size: int
    begin: int
    end: int
    seal: Seal


def mix(seed: int, checksum: int) -> int:
    """A running mix of checksums, 64 bits wide."""
    return seed ^ ((checksum + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _WORD)


def _rows(raw: Any, texts: int, templates: int, data: int | None) -> Iterator[_Row]:
    with memoryview(raw).cast("B") as rows:
        if len(rows) % ROW_BYTES:
            raise ValueError(f"rows of seals have {ROW_BYTES} bytes")
        found = []
        for number, numbers in enumerate(_NUMBERS.iter_unpack(rows)):
            mixed, last, digits, begin, end = numbers[8:13]
            seal = Seal(numbers[5:8], mixed, last, digits, begin, end, numbers[13:])
            row = _Row(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], seal)
            if not _fits(row, texts, templates, data):
                raise ValueError(f"seal {number} does not fit")
            found.append(row)
    yield from found


def _fits(row: _Row, texts: int, templates: int, data: int | None) -> bool:
    seal = row.seal
    ranges = [
        (row.at, row.size, texts),
        (row.template_at, row.size, templates),
        (seal.digits, _DIGITS, row.size),
        (seal.begin, seal.end - seal.begin, row.size),
        *((place, 4, row.size) for place in (*seal.of_data, *seal.of_range) if place != _NOWHERE),
    ]
    if not all(begin >= 0 and 0 <= size <= room - begin for begin, size, room in ranges):
        return False
    return 0 <= row.begin <= row.end and (data is None or row.end <= data)


def _sealed(row: _Row, templates: memoryview, of_data: int) -> bytearray:
    seal = row.seal
    text = bytearray(templates[row.template_at : row.template_at + row.size])
    mixed = mix(seal.mixed, of_data) if row.end > row.begin else seal.mixed
    text[seal.digits : seal.digits + _DIGITS] = b"%020d" % mix(mixed, seal.last)
    of_range = zlib.crc32(text[seal.begin : seal.end])
    for place in seal.of_data:
        if place != _NOWHERE:
            struct.pack_into("<I", text, place, of_data)
    for place in seal.of_range:
        if place != _NOWHERE:
            struct.pack_into("<I", text, place, of_range)
    return text


def _seal(texts: Any, templates: Any, rows: Any, data: Any) -> None:
    """Put each row's template into ``texts``, with the checksums that belong to its ``data``.

    ``rows`` are those of `Seal.row`, one after the other. Raises ValueError for one that does not fit.
    """
    with (
        memoryview(texts).cast("B") as target,
        memoryview(templates).cast("B") as known,
        memoryview(data).cast("B") as payload,
    ):
        if target.readonly:
            raise TypeError("texts need writable memory")
        for row in list(_rows(rows, len(target), len(known), len(payload))):
            of_data = zlib.crc32(payload[row.begin : row.end])
            target[row.at : row.at + row.size] = _sealed(row, known, of_data)


def _are_sealed(texts: Any, templates: Any, rows: Any) -> bool:
    """Whether each row's text is its template with the checksums of some data of its size.

    Whether they belong to the data itself is left to whoever knows its hash. Raises ValueError as `seal`.
    """
    with memoryview(texts).cast("B") as found, memoryview(templates).cast("B") as known:
        for row in list(_rows(rows, len(found), len(known), None)):
            text = found[row.at : row.at + row.size]
            place = row.seal.of_data[0]
            has_data = row.end > row.begin and place != _NOWHERE
            of_data = struct.unpack_from("<I", text, place)[0] if has_data else 0
            if text != _sealed(row, known, of_data):
                return False
    return True


seal: Callable[[Any, Any, Any, Any], None] = extension.seal if can_check else _seal
are_sealed: Callable[[Any, Any, Any], bool] = extension.are_sealed if can_check else _are_sealed
