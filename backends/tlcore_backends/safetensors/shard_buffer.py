"""Memory in which a shard is put together before it travels, used again for the next one."""

from __future__ import annotations

from collections.abc import Sequence

from tlcore.hotpath.new_memory import (
    LEAST_LARGE,
    PAGE_BYTES,
    leave_spare,
    take_spare,
    take_up,
    untouched_memory,
)
from tlcore.storage import Buffer

_FIRST_BYTES = 2 << 20
# One shard travels while the next is put together.
_MOST_KEPT = 2


class ShardBuffer:
    """Bytes one after the other in one piece of memory, which grows as they need.

    Once they are many, it is of ``usual_bytes`` at once, of which only what is used takes up memory, in large
    pages as long as the system has some at hand.
    """

    def __init__(self, usual_bytes: int = 0) -> None:
        self.nbytes = 0
        self._usual_bytes = usual_bytes
        self._memory = untouched_memory(_FIRST_BYTES)
        # Up to where it was taken up, a multiple of a large page.
        self._taken_up = 0
        self._in_large_pages = True

    def skip(self, nbytes: int) -> None:
        """Leave room that is filled later, through `view`."""
        self._make_room(nbytes)
        self.nbytes += nbytes

    def append(self, part: memoryview) -> None:
        """Copy the bytes of ``part`` behind those that are there."""
        begin, end = self.nbytes, self.nbytes + part.nbytes
        self._make_room(part.nbytes)
        with memoryview(self._memory) as memory:
            memory[begin:end] = part
        self.nbytes = end

    def extend(self, parts: Sequence[Buffer]) -> None:
        """Copy all ``parts`` behind those that are there."""
        sizes = [memoryview(part).nbytes for part in parts]
        self._make_room(sum(sizes))
        position = self.nbytes
        with memoryview(self._memory) as memory:
            for part, size in zip(parts, sizes, strict=True):
                memory[position : position + size] = part
                position += size
        self.nbytes = position

    def view(self) -> memoryview:
        """All bytes; the memory is in use for as long as this, or anything made from it, lives."""
        with memoryview(self._memory) as memory:
            return memory[: self.nbytes]

    @property
    def in_use(self) -> bool:
        """Whether anybody holds a view of the memory; where the system cannot tell, somebody may."""
        try:
            # Refused while there is a view; changes nothing otherwise.
            self._memory.resize(len(self._memory))
        except (BufferError, OSError, SystemError):
            return True
        return False

    def _make_room(self, nbytes: int) -> None:
        needed = self.nbytes + nbytes
        if needed > len(self._memory):
            self._grow(needed)
        if self._taken_up < needed and len(self._memory) >= LEAST_LARGE:
            end = min(_whole_pages(needed), len(self._memory))
            large = self._in_large_pages
            self._in_large_pages = take_up(self._memory, self._taken_up, end, large)
            self._taken_up = end

    def _grow(self, needed: int) -> None:
        size = max(needed, 2 * len(self._memory))
        if not len(self._memory) < LEAST_LARGE <= size:
            try:
                # The pages stay what they are; refused while there is a view, and by some systems.
                self._memory.resize(size)
                return
            except (BufferError, OSError, SystemError):
                pass
        size = max(size, self._usual_bytes) if size >= LEAST_LARGE else size
        larger, taken_up = take_spare(size) or (untouched_memory(size), 0)
        with memoryview(larger) as new, self.view() as old:
            new[: self.nbytes] = old
        self._memory = larger
        self._taken_up = max(taken_up, _whole_pages(self.nbytes))
        self._in_large_pages = True

    def leave(self) -> None:
        """Leave the memory to the next capture of this process; nobody may use this any more."""
        if len(self._memory) >= LEAST_LARGE:
            leave_spare(self._memory, self._taken_up)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class ShardBuffers:
    """Keeps the memory of shards that have been sent: new memory costs more than the copy into it."""

    def __init__(self, usual_bytes: int = 0) -> None:
        self._usual_bytes = usual_bytes
        self._free: list[ShardBuffer] = []

    def take(self) -> ShardBuffer:
        """Memory without bytes in it."""
        try:
            gathered = self._free.pop()
        except IndexError:
            return ShardBuffer(self._usual_bytes)
        gathered.nbytes = 0
        return gathered

    def give(self, gathered: ShardBuffer) -> None:
        """Take memory back, unless somebody still uses it: an upload that was given up may read on."""
        if len(self._free) < _MOST_KEPT and not gathered.in_use:
            self._free.append(gathered)

    def clear(self) -> None:
        """Keep none."""
        for gathered in self._free:
            gathered.leave()
        self._free.clear()
