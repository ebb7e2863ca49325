"""The data file of a segment: the rows of each captured tensor, over all its steps, in one array."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tlcore.layout.names import unique
from tlcore.layout.templates import quoted

from .described import Slot
from .shard import header_of

LENGTH_BYTES = 8
ALIGNMENT = 8
_METADATA = ('"format":"pt"', '"tlcore.layout":"2"')
# What the offsets of a column may be longer than those it has before it has its place, and a comma.
_OFFSETS_BYTES = 40
# Each piece that is written by itself costs about as much as copying so many bytes, and each one of a request
# more, as the client's thread waits for the interpreter.
_LARGE_PIECE = 2 << 10
_LARGE_PART = 256 << 10
Bytes = np.ndarray


class Chunk(NamedTuple):
    """The bytes of one tensor in steps that follow each other: ``nbytes`` at ``offset`` in each of ``steps``.

    ``hashes`` are ``[n, 16]``, ``rows`` what each step adds to the array.
    """

    steps: Bytes
    offset: int
    nbytes: int
    hashes: Bytes
    rows: int


@dataclass(slots=True)
class Column:
    """One array of a segment while its file is laid out."""

    slot: Slot
    chunks: list[Chunk] = field(default_factory=list)
    key: str = ""
    file: int = 0
    # Where its bytes begin in the file.
    begin: int = 0
    constant: bool = False
    same_as: int | None = None
    hashes: bytes = b""

    @property
    def times(self) -> int:
        """In how many steps the tensor was captured."""
        return sum(len(chunk.steps) for chunk in self.chunks)

    @property
    def stored_rows(self) -> int:
        """The extent of the array's first dimension in the file."""
        if self.constant:
            return self.chunks[0].rows
        return sum(chunk.rows * len(chunk.steps) for chunk in self.chunks)

    @property
    def stored_bytes(self) -> int:
        """The array's size in the file."""
        if self.constant:
            return self.chunks[0].nbytes
        return sum(chunk.nbytes * len(chunk.steps) for chunk in self.chunks)

    def take_key(self, keys: set[str]) -> None:
        """Choose a key that is not among the file's ``keys`` yet."""
        self.key = unique(self.slot.tail, keys, mark="#")

    def settle(self) -> None:
        """Find out whether the tensor was the same in every step."""
        self.hashes = b"".join(chunk.hashes.tobytes() for chunk in self.chunks)
        first = self.chunks[0]
        size = len(first.hashes[0])
        self.constant = (
            len(self.hashes) > size
            and all(chunk.rows == first.rows for chunk in self.chunks)
            and self.hashes == self.hashes[:size] * (len(self.hashes) // size)
        )
        if self.constant:
            self.hashes = self.hashes[:size]

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for columns that hold the same bytes and mean the same by them, step by step."""
        extents = tuple((chunk.rows, len(chunk.steps)) for chunk in self.chunks)
        # A number's bytes may be those of a vector of one, which is another array.
        form = self.slot.dtype, len(self.slot.origin.shape), self.slot.row
        return *form, self.hashes, self.constant, _merged(extents)

    def copy_into(self, target: Bytes) -> None:
        """Put the array's bytes together."""
        position = 0
        for chunk in self.chunks:
            count = 1 if self.constant else len(chunk.steps)
            end = position + count * chunk.nbytes
            part = chunk.steps[:count, chunk.offset : chunk.offset + chunk.nbytes]
            target[position:end].reshape(count, chunk.nbytes)[:] = part
            position = end
            if self.constant:
                return

    def is_in_large_pieces(self) -> bool:
        """Whether to write its bytes from where they lie takes less than to put them together first."""
        return all(
            chunk.nbytes >= _LARGE_PIECE or len(chunk.steps) == 1 or chunk.nbytes == chunk.steps.shape[1]
            for chunk in self.chunks
        )

    def is_in_large_parts(self) -> bool:
        """The same, where the bytes are sent in a request."""
        count = sum(
            1 if self.constant or chunk.nbytes == chunk.steps.shape[1] else len(chunk.steps)
            for chunk in self.chunks
        )
        return count * _LARGE_PART <= self.stored_bytes

    def pieces(self) -> Iterator[memoryview]:
        """The array's bytes, in order, where they lie."""
        for chunk in self.chunks:
            count = 1 if self.constant else len(chunk.steps)
            width = chunk.steps.shape[1]
            if not chunk.nbytes:
                continue
            flat = chunk.steps.reshape(-1).data
            if width == chunk.nbytes:
                yield flat[: count * width]
            else:
                for begin in range(chunk.offset, chunk.offset + count * width, width):
                    yield flat[begin : begin + chunk.nbytes]
            if self.constant:
                return

    def entry(self) -> str:
        """The array's entry in the index."""
        key = "" if self.key == self.slot.tail else f',"key":{quoted(self.key)}'
        if self.same_as is not None:
            return f'{self.slot.text}{key},"same_as":{self.same_as}}}'
        constant = ',"constant":true' if self.constant else ""
        hashes = base64.b64encode(self.hashes).decode("ascii")
        return (
            f'{self.slot.text}{key},"file":{self.file},"offset":{self.begin}{constant},"hashes":"{hashes}"}}'
        )


def _merged(extents: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for rows, count in extents:
        if found and found[-1][0] == rows:
            found[-1] = rows, found[-1][1] + count
        else:
            found.append((rows, count))
    return tuple(found)


def lay_out(columns: Mapping[int, Column], taken: dict[object, int], file: int) -> bytes:
    """Decide where each of ``columns`` lies in a file, and return the file's head, its header.

    They are told by their numbers in the index; ``taken`` has the content that earlier columns of the segment
    store already, by number. Columns with larger elements come first, so that each is aligned.
    """
    keys: set[str] = set()
    for number, column in columns.items():
        column.take_key(keys)
        column.settle()
        column.file = file
        original = taken.setdefault(column.content, number)
        column.same_as = None if original == number else original
    own = [column for column in columns.values() if column.same_as is None]
    own.sort(key=lambda column: -column.slot.dtype.itemsize)
    position = 0
    for column in own:
        column.begin = position
        position += column.stored_bytes
    return head_of(columns, own)


def head_of(columns: Mapping[int, Column], own: Iterable[Column], reserve: int = 0) -> bytes:
    """The head of a file of ``columns``, at least ``reserve`` bytes long.

    Of ``own``, those whose bytes are in it, ``begin`` is known from the first tensor on; then from the file's
    beginning.
    """
    metadata = list(_METADATA)
    entries: list[str] = []
    for column in own:
        entry, marks = _own_texts(column)
        entries.append(entry)
        metadata += marks
    metadata += filter(None, (_alias_text(column, columns) for column in columns.values()))
    text = ("{" + ",".join(['"__metadata__":{' + ",".join(metadata) + "}", *entries]) + "}").encode("ascii")
    length = max(len(text) + -(LENGTH_BYTES + len(text)) % ALIGNMENT, reserve - LENGTH_BYTES)
    head = length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
    for column in own:
        column.begin += len(head)
    return head


# How long a head of nothing is.
EMPTY_HEAD_BYTES = LENGTH_BYTES + ALIGNMENT + len('{"__metadata__":{}}') + len(",".join(_METADATA))


def head_bytes(column: Column, columns: Mapping[int, Column]) -> int:
    """How much longer, at most, a head gets by one of its ``columns``."""
    if column.same_as is not None:
        return len(_alias_text(column, columns)) + 1
    entry, marks = _own_texts(column)
    return len(entry) + _OFFSETS_BYTES + sum(len(mark) + 1 for mark in marks)


def _own_texts(column: Column) -> tuple[str, list[str]]:
    """A column's entry in the header, and what stands of it in the metadata."""
    fragment, mark = header_of(column.slot.dtype, (column.stored_rows, *column.slot.row))
    end = column.begin + column.stored_bytes
    marks = [f"{quoted(f'tlcore.dtype.{column.key}')}:{mark}"] if mark else []
    if column.constant:
        marks.append(f'{quoted(f"tlcore.constant.{column.key}")}:"{column.times}"')
    return f"{quoted(column.key)}:{fragment}[{column.begin},{end}]}}", marks


def _alias_text(column: Column, columns: Mapping[int, Column]) -> str:
    """What the metadata say of a column that has the bytes of another one in the file; else nothing."""
    original = columns.get(column.same_as) if column.same_as is not None else None
    return "" if original is None else f"{quoted(f'tlcore.alias.{column.key}')}:{quoted(original.key)}"
