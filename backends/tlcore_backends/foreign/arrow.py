"""Where the columns of an Arrow stream (``.arrow``, as `datasets` writes) lie in its file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tlcore.errors import ReadError

from .files import DumpFiles, shown_path

_CONTINUES = 0xFFFFFFFF
_LARGEST_MESSAGE = 64 << 20
_SCHEMA, _BATCH = 1, 3
_INT, _FLOAT, _LIST, _FIXED = 2, 3, 12, 16
_FLOATS = {0: "float16", 1: "float32", 2: "float64"}
_DEEPEST = 8


class Column(NamedTuple):
    """A column: its name, its values' dtype, and its lists from the outermost in.

    Of lists of one size that is known ``sizes`` has it, else None. No dtype where it has no such values.
    """

    name: str
    dtype: str | None
    sizes: tuple[int | None, ...]


class Span(NamedTuple):
    """Bytes of the file: from where on, and how many."""

    at: int
    size: int


class ColumnAt(NamedTuple):
    """A column of one batch: its ``offsets`` for each list of no fixed size, and its values."""

    offsets: tuple[Span | None, ...]
    values: Span
    nulls: bool


class Rows(NamedTuple):
    """A batch of rows, by column."""

    number: int
    columns: dict[str, ColumnAt]


def read_stream(files: DumpFiles, file: str, size: int) -> tuple[list[Column], list[Rows]]:
    """The columns of a stream and its batches. Raises ReadError for what is none, or is compressed."""
    columns: list[_Field] = []
    batches: list[Rows] = []
    try:
        for kind, table, body in _messages(files, file, size):
            if kind == _SCHEMA and not columns:
                columns = [_Field(each, 0) for each in table.tables(1)]
            elif kind == _BATCH:
                batches.append(_rows(table, columns, body, size))
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise ReadError(
            f"{shown_path(files, file)}: not an Arrow stream that can be read ({error})"
        ) from None
    if not columns:
        raise ReadError(f"{shown_path(files, file)}: not an Arrow stream, it has no schema")
    return [each.column for each in columns], batches


def _messages(files: DumpFiles, file: str, size: int) -> Iterator[tuple[int, _Table, int]]:
    """Each message's kind, its header and where its body begins."""
    at = 0
    while at + 8 <= size:
        mark, length = struct.unpack("<II", files.read(file, at, at + 8))
        if mark != _CONTINUES:
            raise ValueError("it does not begin as one")
        if length == 0:
            return
        if length > _LARGEST_MESSAGE or at + 8 + length > size:
            raise ValueError("it ends too early")
        data = files.read(file, at + 8, at + 8 + length)
        message = _Table(data, struct.unpack_from("<I", data)[0])
        body = at + 8 + length
        header = message.table(2)
        if header is not None:
            yield message.number(1, "<B"), header, body
        length = message.number(3, "<q")
        if length < 0 or body + length > size:
            raise ValueError("it ends too early")
        at = body + length


class _Table:
    """A table of a flat buffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        back = struct.unpack_from("<i", data, at)[0]
        self._fields = at - back
        if not 0 <= self._fields < len(data):
            raise ValueError("a table leads out of it")
        self._size = struct.unpack_from("<H", data, self._fields)[0]

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + entry)[0]
        return self._at + offset if offset else None

    def number(self, field: int, form: str) -> int:
        """A whole number, zero where the table does not have it."""
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(form, self._data, place)[0])

    def table(self, field: int) -> _Table | None:
        """A table within this one."""
        place = self._place(field)
        return None if place is None else _Table(self._data, self._follow(place))

    def text(self, field: int) -> str:
        """A text; none where the table does not have it."""
        place = self._place(field)
        if place is None:
            return ""
        at = self._follow(place)
        length = struct.unpack_from("<I", self._data, at)[0]
        return self._data[at + 4 : at + 4 + length].decode()

    def tables(self, field: int) -> list[_Table]:
        """The tables of a vector."""
        at, count = self._vector(field, 4)
        return [_Table(self._data, self._follow(at + 4 * place)) for place in range(count)]

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """The structures of a vector, each of two numbers."""
        at, count = self._vector(field, 16)
        return [struct.unpack_from("<qq", self._data, at + 16 * place) for place in range(count)]

    def _vector(self, field: int, width: int) -> tuple[int, int]:
        place = self._place(field)
        if place is None:
            return 0, 0
        at = self._follow(place)
        count = struct.unpack_from("<I", self._data, at)[0]
        if count * width > len(self._data):
            raise ValueError("a vector leads out of it")
        return at + 4, count

    def _follow(self, place: int) -> int:
        return place + int(struct.unpack_from("<I", self._data, place)[0])


class _Field:
    """A field of the schema, with how many buffers of a batch it takes."""

    def __init__(self, table: _Table, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("its columns are nested too deep")
        self.name = table.text(0)
        self.kind = table.number(2, "<B")
        held = table.table(3)
        self.children = [_Field(each, depth + 1) for each in table.tables(5)]
        self.size: int | None = None
        self.dtype: str | None = None
        if held is not None and self.kind == _FIXED:
            self.size = held.number(0, "<i")
        elif held is not None and self.kind == _FLOAT:
            self.dtype = _FLOATS.get(held.number(0, "<h"))
        elif held is not None and self.kind == _INT:
            bits = held.number(0, "<i")
            self.dtype = (
                f"{'' if held.number(1, '<B') else 'u'}int{bits}" if bits in (8, 16, 32, 64) else None
            )

    @property
    def is_list(self) -> bool:
        """Whether it is a list of one kind of values."""
        return self.kind in (_LIST, _FIXED) and len(self.children) == 1

    @property
    def column(self) -> Column:
        """What is told of it."""
        sizes: list[int | None] = []
        field = self
        while field.is_list:
            sizes.append(field.size)
            field = field.children[0]
        return Column(self.name, field.dtype, tuple(sizes))

    @property
    def is_plain(self) -> bool:
        """Whether it is values, or lists of them."""
        return self.dtype is not None or (self.is_list and self.children[0].is_plain)


def _rows(table: _Table, fields: list[_Field], body: int, size: int) -> Rows:
    if table.table(3) is not None:
        raise ValueError("it is compressed")
    nodes = iter(table.pairs(1))
    buffers = iter([_span(body, at, length, size) for at, length in table.pairs(2)])
    count = table.number(0, "<q")
    # Each row takes some bytes.
    if not 0 <= count <= size:
        raise ValueError("a batch has no such number of rows")
    columns: dict[str, ColumnAt] = {}
    for field in fields:
        # What follows a column of another kind cannot be told: its buffers are not counted here.
        if not field.is_plain:
            break
        columns[field.name] = _column(field, nodes, buffers)
    return Rows(count, columns)


def _column(field: _Field, nodes: Iterator[tuple[int, int]], buffers: Iterator[Span]) -> ColumnAt:
    offsets: list[Span | None] = []
    nulls = False
    while True:
        missing = ValueError("a batch has too few buffers")
        node, validity = next(nodes, None), next(buffers, None)
        if node is None or validity is None:
            raise missing
        nulls |= node[1] != 0
        if field.is_list and field.kind == _FIXED:
            offsets.append(None)
        else:
            found = next(buffers, None)
            if found is None:
                raise missing
            if not field.is_list:
                return ColumnAt(tuple(offsets), found, nulls)
            offsets.append(found)
        field = field.children[0]


def _span(body: int, at: int, length: int, size: int) -> Span:
    if at < 0 or length < 0 or body + at + length > size:
        raise ValueError("a buffer leads out of it")
    return Span(body + at, length)
