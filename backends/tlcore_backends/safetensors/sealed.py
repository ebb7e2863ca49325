"""What leaves a segment that is full: its data file, put together, and its index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, overload

import numpy as np

from tlcore.hotpath.copying import Pieces, copy_from

from .blocks import Block
from .columns import Column
from .kept_memory import KeptMemory
from .shard_buffer import ShardBuffer, ShardBuffers

# More is put together in memory that is used again.
_LARGE_HEAD = 1 << 20
_GIVEN_BACK = "the memory of a file's parts was given back"
# A block that has some of a column, the tensor there, and of how many steps they are.
Stored = tuple[Block, int, int]


class FileParts(Pieces):
    """A data file's bytes, of which those of columns that are ``apart`` lie where their steps came.

    ``whole`` has all others, the head first. Buffers are made when somebody asks for them: they are many.
    """

    def __init__(
        self, whole: memoryview, head_bytes: int, own: Sequence[Column], apart: Sequence[bool]
    ) -> None:
        # What follows one another: part of the whole, or all that a column has.
        self._runs: list[tuple[int, int] | list[Stored]] = []
        begin, end = 0, head_bytes
        for column, is_apart in zip(own, apart, strict=True):
            if is_apart:
                self._runs += [(begin, end), column.stored()]
                begin = end
            else:
                end += column.stored_bytes
        self._runs.append((begin, end))
        self._whole = whole
        self._views: list[memoryview] | None = None

    def _buffers(self) -> list[memoryview]:
        runs = self._runs
        if not runs:
            # A client that was given up before it began must not take it for an empty file.
            raise ValueError(_GIVEN_BACK)
        if self._views is None:
            views: list[memoryview] = []
            for run in runs:
                if isinstance(run, tuple):
                    views.append(self._whole[slice(*run)])
                else:
                    views += [piece for block, *which in run for piece in block.pieces(*which)]
            self._views = views
        return self._views

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...

    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        return self._buffers()[index]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._buffers())

    def __len__(self) -> int:
        return len(self._buffers())

    def places(self) -> tuple[np.ndarray, np.ndarray, object]:
        """Where all of it lies, without a look at each piece, and what holds it."""
        runs, whole = self._runs, np.frombuffer(self._whole, np.uint8)
        if not runs:
            raise ValueError(_GIVEN_BACK)
        begin = whole.ctypes.data
        counts: list[int] = []
        # Those in the whole, and of each block by how many steps they are: where they stand, and which.
        fixed: list[tuple[int, int, int]] = []
        tensors: dict[tuple[Block, int], tuple[list[int], list[int]]] = {}
        for run in runs:
            if isinstance(run, tuple):
                fixed.append((len(counts), begin + run[0], run[1] - run[0]))
                counts.append(1)
                continue
            for block, tensor, steps in run:
                ranks, which = tensors.setdefault((block, steps), ([], []))
                ranks.append(len(counts))
                which.append(tensor)
                counts.append(steps)
        ends = np.cumsum(counts)
        starts = ends - counts
        addresses, sizes = np.empty((2, int(ends[-1])), np.int64)
        ranks, addresses_fixed, sizes_fixed = map(list, zip(*fixed, strict=True))
        addresses[starts[ranks]], sizes[starts[ranks]] = addresses_fixed, sizes_fixed
        for (block, steps), (ranks, which) in tensors.items():
            at = (starts[ranks][:, None] + np.arange(steps)).reshape(-1)
            addresses[at], sizes[at] = block.addresses(which, steps)
        return addresses, sizes, (runs, whole)

    def end(self) -> bool:
        """Let go of the memory; whether nobody has a buffer of it any more."""
        views, self._views, self._runs = self._views or [], [], []
        clean = True
        for view in (*views, self._whole):
            try:
                view.release()
            except BufferError:
                # An upload that was given up still reads.
                clean = False
        return clean


class File(NamedTuple):
    """A data file that is put together: its name, its bytes, and the memory to give back after them.

    So is what it has ``kept``.
    """

    name: str
    parts: FileParts
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
) -> tuple[FileParts, list[ShardBuffer]]:
    """The bytes of a file, in memory to give back; those of columns that are ``apart`` where they are."""
    together = [column for column, is_apart in zip(own, apart, strict=True) if not is_apart]
    size = len(head) + sum(column.stored_bytes for column in together)
    memory = [buffers.take()] if size > _LARGE_HEAD else []
    for each in memory:
        each.skip(size)
    whole = memory[0].view() if memory else memoryview(bytearray(size))
    whole[: len(head)] = head
    _copy(together, whole[len(head) :])
    return FileParts(whole, len(head), own, apart), memory


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
