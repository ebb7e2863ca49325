"""What leaves a segment that is full: its data file, put together, and its index."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from tlcore.hotpath.copying import copy_from
from tlcore.protocols import Buffer

from .columns import Column
from .kept_memory import KeptMemory
from .shard_buffer import ShardBuffer, ShardBuffers

# More is put together in memory that is used again.
_LARGE_HEAD = 1 << 20


class File(NamedTuple):
    """A data file that is put together: its name, its bytes, and the memory to give back after them.

    So is what it has ``kept``.
    """

    name: str
    parts: Sequence[Buffer]
    nbytes: int
    memory: Sequence[ShardBuffer]
    kept: KeptMemory

    @property
    def held_bytes(self) -> int:
        """How many bytes nobody else counts."""
        return sum(each.nbytes for each in self.memory) if self.kept.leases else self.nbytes


class Sealed(NamedTuple):
    """A segment that is complete: its data file, its index's name and text, and the steps that it commits.

    ``nbytes`` is the size of ``file``.
    """

    file: File | None
    index_name: str
    text: bytes
    steps: Sequence[int]
    nbytes: int


def put_together(
    buffers: ShardBuffers, head: bytes, own: Sequence[Column], apart: Sequence[bool]
) -> tuple[list[Buffer], list[ShardBuffer]]:
    """The bytes of a file, in memory to give back; those of columns that are ``apart`` where they are."""
    together = [column for column, is_apart in zip(own, apart, strict=True) if not is_apart]
    size = len(head) + sum(column.stored_bytes for column in together)
    memory = [buffers.take()] if size > _LARGE_HEAD else []
    for each in memory:
        each.skip(size)
    whole = memory[0].view() if memory else memoryview(bytearray(size))
    whole[: len(head)] = head
    _copy(together, whole[len(head) :])
    parts: list[Buffer] = []
    begin, end = 0, len(head)
    for column, is_apart in zip(own, apart, strict=True):
        if is_apart:
            parts += [whole[begin:end], *column.pieces()]
            begin = end
        else:
            end += column.stored_bytes
    parts.append(whole[begin:end])
    return parts, memory


def _copy(columns: Sequence[Column], target: memoryview) -> None:
    """Put the bytes of columns one after the other."""
    stored = [part for column in columns for part in column.stored()]
    found = [
        block.addresses([tensor for _, tensor, _ in parts], steps)
        for (block, steps), parts in groupby(stored, key=itemgetter(0, 2))
    ]
    if found:
        addresses, sizes = map(np.concatenate, zip(*found, strict=True))
        copy_from(target, addresses, sizes)
