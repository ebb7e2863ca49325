"""The data file of a segment: the rows of each captured tensor, over all its steps, in one array."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tlcore.layout.hashes import HASH_BYTES
from tlcore.layout.names import unique
from tlcore.layout.templates import quoted

from .blocks import ROWS_BYTES, Block
from .described import Slot
from .shard import header_of

LENGTH_BYTES = 8
ALIGNMENT = 8
_METADATA = ('"format":"pt"', '"tlcore.layout":"2"')
# What the offsets of a column may be longer than those it has before it has its place, and a comma.
_OFFSETS_BYTES = 40
# Each piece of a request costs about as much as copying so many bytes: the client's thread waits for the
# interpreter.
_LARGE_PART = 256 << 10


class Chunk(NamedTuple):
    """One tensor's bytes in the steps of a block."""

    block: Block
    tensor: int


@dataclass(slots=True)
class Column:
    """One array of a segment while its file is laid out.

    What it holds is known once it is settled: ``times`` it was captured, ``stored_rows`` (the extent of its
    first dimension in the file) and ``stored_bytes``.
    """

    slot: Slot
    chunks: list[Chunk] = field(default_factory=list)
    key: str = ""
    file: int = 0
    # Where its bytes begin in the file.
    begin: int = 0
    constant: bool = False
    same_as: int | None = None
    hashes: bytes = b""
    row_text: bytes = b""
    times: int = 0
    stored_rows: int = 0
    stored_bytes: int = 0

    @classmethod
    def of_one(cls, slot: Slot, digest: bytes) -> Column:
        """A settled column of a tensor that was captured once, and whose bytes go their own way."""
        column = cls(slot, hashes=digest, row_text=slot.rows.to_bytes(ROWS_BYTES, sys.byteorder))
        column.times, column.stored_rows, column.stored_bytes = 1, slot.rows, slot.nbytes
        return column

    def take_key(self, keys: set[str]) -> None:
        """Choose a key that is not among the file's ``keys`` yet."""
        self.key = unique(self.slot.tail, keys, mark="#")

    def settle(self) -> None:
        """Find out what its chunks are together, and whether the tensor was the same in every step."""
        chunks = self.chunks
        block, tensor = chunks[0]
        self.hashes, self.row_text, self.times = block.hashes(tensor), block.row_text(tensor), block.steps
        self.stored_rows, self.stored_bytes = block.rows[tensor], block.nbytes[tensor]
        self.constant = block.is_constant[tensor] and block.steps > 1
        if len(chunks) > 1:
            self._settle_all()
        if self.constant:
            self.hashes = self.hashes[:HASH_BYTES]
            self.stored_rows, self.stored_bytes = block.first_rows[tensor], block.first_nbytes[tensor]

    def _settle_all(self) -> None:
        chunks = self.chunks
        block, tensor = chunks[0]
        self.hashes = b"".join([block.hashes(tensor) for block, tensor in chunks])
        self.row_text = b"".join([block.row_text(tensor) for block, tensor in chunks])
        self.times = len(self.hashes) // HASH_BYTES
        self.constant = block.is_constant[tensor] and self._repeats()
        self.stored_rows = sum([block.rows[tensor] for block, tensor in chunks])
        self.stored_bytes = sum([block.nbytes[tensor] for block, tensor in chunks])

    def _repeats(self) -> bool:
        """Whether hash and rows are those of the first step throughout."""
        texts = (self.hashes, HASH_BYTES), (self.row_text, ROWS_BYTES)
        return all(text == text[:width] * self.times for text, width in texts)

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for columns that hold the same bytes and mean the same by them, step by step."""
        # A number's bytes may be those of a vector of one, which is another array.
        form = self.slot.dtype, len(self.slot.origin.shape), self.slot.row
        return *form, self.hashes, self.constant, self.row_text

    def is_in_large_pieces(self) -> bool:
        """Whether to write its bytes from where they lie takes less than to put them together first."""
        return all(block.is_large(tensor) for block, tensor in self.chunks)

    def is_in_large_parts(self) -> bool:
        """The same, where the bytes are sent in a request."""
        count = sum(block.count(tensor, steps) for block, tensor, steps in self.stored())
        return count * _LARGE_PART <= self.stored_bytes

    def stored(self) -> list[tuple[Block, int, int]]:
        """The blocks that have the array's bytes, the tensor there, and of how many steps they are."""
        if self.constant:
            return [(*self.chunks[0], 1)]
        return [(block, tensor, block.steps) for block, tensor in self.chunks]

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


def columns_of(block: Block, slots: Sequence[Slot], numbers: Sequence[int]) -> dict[int, Column]:
    """A column for each tensor of a block, by its array's number."""
    described = enumerate(zip(numbers, slots, strict=True))
    return {number: Column(slot, [Chunk(block, tensor)]) for tensor, (number, slot) in described}


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
