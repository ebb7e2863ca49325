"""The data file of a segment: the rows of each captured tensor, over all its steps, in one array."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tlcore.layout.names import unique
from tlcore.layout.templates import quoted

from .described import Slot
from .shard import header_of

LENGTH_BYTES = 8
_ALIGNMENT = 8
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


def lay_out(columns: Sequence[Column], numbers: Sequence[int], taken: dict[object, int], file: int) -> bytes:
    """Decide where each of ``columns`` lies in a file, and return the file's head, its header.

    ``numbers`` are theirs in the index; ``taken`` has the content that earlier columns of the segment store
    already, by number. Columns with larger elements come first, so that each is aligned.
    """
    keys: set[str] = set()
    for number, column in zip(numbers, columns, strict=True):
        column.key = unique(column.slot.tail, keys, mark="#")
        column.settle()
        column.file = file
        original = taken.setdefault(column.content, number)
        column.same_as = None if original == number else original
    by_number = dict(zip(numbers, columns, strict=True))
    own = [column for column in columns if column.same_as is None]
    own.sort(key=lambda column: -column.slot.dtype.itemsize)
    metadata = ['"format":"pt"', '"tlcore.layout":"2"']
    entries: list[str] = []
    position = 0
    for column in own:
        column.begin = position
        position += column.stored_bytes
        fragment, mark = header_of(column.slot.dtype, (column.stored_rows, *column.slot.row))
        entries.append(f"{quoted(column.key)}:{fragment}[{column.begin},{position}]}}")
        if mark:
            metadata.append(f"{quoted(f'tlcore.dtype.{column.key}')}:{mark}")
        if column.constant:
            metadata.append(f'{quoted(f"tlcore.constant.{column.key}")}:"{column.times}"')
    for column in columns:
        original_column = by_number.get(column.same_as) if column.same_as is not None else None
        if original_column is not None:
            metadata.append(f"{quoted(f'tlcore.alias.{column.key}')}:{quoted(original_column.key)}")
    text = ("{" + ",".join(['"__metadata__":{' + ",".join(metadata) + "}", *entries]) + "}").encode("ascii")
    length = len(text) + -(LENGTH_BYTES + len(text)) % _ALIGNMENT
    head = length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
    for column in own:
        column.begin += len(head)
    return head
