"""Pooled host memory for staged copies, bounded in bytes.

It is allocated once and recycled, because fresh memory costs several times the copy itself in page
faults. The pool's bound is the queue's bound: a chunk is free, being filled, on its way through the
pipeline, or both of the latter.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Collection, Iterable

import torch

from ...hotpath.copying import Memory
from ...hotpath.new_memory import LEAST_LARGE, leave_spare, new_memory, take_spare
from .accelerator import Event

CHUNK_BYTES = 32 << 20
_ALIGN = 64
# How much memory may be kept for each byte that is wanted of it.
_MOST_LENT = 2


class Chunk(Memory):
    """A piece of host memory that is filled from the front with tensor bytes.

    ``pinned`` memory is what a device can write to by itself; ``written`` is when it has. ``batches``
    counts those on their way through the pipeline that need it; ``filling`` says that more may be added, and
    ``spoilt`` that somebody may read it for as long as it lives.
    """

    __slots__ = ("_memory", "batches", "filling", "spoilt", "tensor", "view", "written")

    def __init__(self, size: int, pinned: bool = False) -> None:
        self.size = size
        self.bytes = 0
        self.batches = 0
        self.filling = True
        self.spoilt = False
        self.written: Event | None = None
        # A tensor made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self._memory: mmap.mmap | None = None
            found = _pinned(size) if pinned else None
            if found is None:
                left = take_spare(size)
                self._memory = new_memory(size) if left is None else left[0]
                found = torch.frombuffer(self._memory, dtype=torch.uint8)
            self.tensor = found
        self.view = memoryview(self.tensor.numpy())  # type: ignore[arg-type]
        self.address = self.tensor.data_ptr()

    def ready(self) -> None:
        """Return once the bytes are there; those that the host has copied always are."""
        if self.written is not None:
            self.written.synchronize()

    def clear(self) -> None:
        """Make it fit to be filled again: a transfer that nobody waited for may still write into it."""
        self.ready()
        self.written = None

    def leave(self) -> None:
        """Leave the memory to the next capture of this process; nobody may use the chunk any more."""
        if self._memory is not None and self.size >= LEAST_LARGE and not self.spoilt:
            leave_spare(self._memory, self.size)


def _pinned(size: int) -> torch.Tensor | None:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        # The system limits pinned memory. A copy to other memory is right as well, only slower.
        return None


# Stands for "no chunk yet": full from the beginning.
NO_CHUNK = Chunk(1)
NO_CHUNK.bytes = NO_CHUNK.size + 1


class ChunkLease:
    """Chunks that somebody keeps beside the batch that they came with."""

    def __init__(self, pool: HostPool, chunks: Iterable[Chunk]) -> None:
        self._pool = pool
        self._chunks = tuple(chunks)

    def end(self, clean: bool = True) -> None:
        """Give them back, once; not ``clean`` while somebody may still read them. Safe to repeat."""
        chunks, self._chunks = self._chunks, ()
        for chunk in chunks:
            chunk.spoilt |= not clean
            self._pool.release(chunk)


class HostPool:
    """Chunks bounded in bytes; waiting for one is what slows a model that outruns its storage.

    ``pinned`` says of which kind new chunks are, ``waited`` for how many seconds anybody had to wait.
    ``on_wait`` is called when somebody begins to.
    """

    def __init__(self, limit: int, on_full: str) -> None:
        self.limit = limit
        self.pinned = False
        self.waited = 0.0
        self.on_wait: Callable[[], object] = lambda: None
        self.drops = on_full == "drop"
        self._free: list[Chunk] = []
        self._allocated = 0
        self._in_flight = 0
        # What a sink keeps beside the pool's chunks.
        self._held = 0
        self._recycles = True
        # Taken by itself, it needs no Python.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.chunk_bytes = max(1, min(CHUNK_BYTES, limit))

    def acquire(self, nbytes: int, wait_s: float) -> tuple[Chunk | None, float]:
        """A chunk of at least ``nbytes`` bytes and the seconds waited; None when the queue stays full.

        A chunk beyond the bound is given when nothing is in flight, so that a tensor larger than the
        whole queue still gets through, and all of one call's arguments or results: they are handed over
        together, and the model holds them at the same time too.
        """
        size = max(nbytes, self.chunk_bytes)
        begin = time.monotonic()
        with self._lock:
            while True:
                chunk = self._take(nbytes, size)
                waited = time.monotonic() - begin
                if chunk is not None or self.drops or waited >= wait_s:
                    self.waited += waited
                    break
                self.on_wait()
                self._changed.wait(wait_s - waited)
        if chunk is not None:
            chunk.clear()
        return chunk, waited

    def _take(self, nbytes: int, size: int) -> Chunk | None:
        self._recycles = True
        for index, chunk in enumerate(self._free):
            if chunk.size >= nbytes:
                return self._free.pop(index)
        while self._free and self._taken + size > self.limit:
            self._allocated -= self._free.pop().size
        if self._taken + size > self.limit and self._in_flight:
            return None
        chunk = Chunk(size, self.pinned)
        self._allocated += size
        return chunk

    @property
    def _taken(self) -> int:
        return self._allocated + self._held

    def hold(self, nbytes: int) -> None:
        """Count ``nbytes`` more (or fewer) that a sink keeps of what it was given."""
        with self._lock:
            self._held += nbytes
            if nbytes < 0:
                self._changed.notify_all()

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk for ``nbytes`` bytes could be had without waiting."""
        with self._lock:
            fits = self._taken + max(nbytes, self.chunk_bytes) <= self.limit
            return fits or any(chunk.size >= nbytes for chunk in self._free)

    def submitted(self, chunk: Chunk) -> None:
        """Note that a batch in the pipeline needs the chunk and will release it."""
        with self._lock:
            if not chunk.batches:
                self._in_flight += chunk.size
            chunk.batches += 1

    def release(self, chunk: Chunk) -> None:
        """A batch needs the chunk no more."""
        with self._lock:
            chunk.batches -= 1
            if not chunk.batches:
                self._in_flight -= chunk.size
                self._take_back(chunk)
                self._changed.notify_all()

    def lend(self, chunks: Collection[Chunk], nbytes: int) -> ChunkLease | None:
        """Chunks for whoever keeps ``nbytes`` of them; None where much more would be kept than these."""
        if sum(chunk.size for chunk in chunks) > _MOST_LENT * nbytes:
            return None
        for chunk in chunks:
            self.submitted(chunk)
        return ChunkLease(self, chunks)

    def leave(self, chunk: Chunk) -> None:
        """Nothing more is added to the chunk: it comes back when no batch needs it."""
        with self._lock:
            chunk.filling = False
            self._take_back(chunk)

    def rewind(self, chunk: Chunk) -> bool:
        """Fill the chunk from the front again, unless a batch still needs it."""
        with self._lock:
            if chunk.batches or chunk.spoilt:
                return False
            chunk.bytes = 0
            return True

    def _take_back(self, chunk: Chunk) -> None:
        if chunk.batches or chunk.filling:
            return
        chunk.bytes = 0
        chunk.filling = True
        if self._recycles and not chunk.spoilt and self._taken <= self.limit:
            self._free.append(chunk)
            return
        self._allocated -= chunk.size
        if not self._recycles:
            chunk.leave()

    def retire(self) -> None:
        """Keep no memory, until a chunk is asked for again."""
        with self._lock:
            self._recycles = False
            self._allocated -= sum(chunk.size for chunk in self._free)
            for chunk in self._free:
                chunk.leave()
            self._free.clear()

    @property
    def allocated(self) -> int:
        """Bytes of all chunks there are."""
        with self._lock:
            return self._allocated

    @property
    def in_flight(self) -> int:
        """Bytes of chunks handed to the pipeline and not yet released, and what the sink keeps."""
        with self._lock:
            return self._in_flight + self._held


def aligned(offset: int) -> int:
    """The first offset at or after ``offset`` where a tensor may begin."""
    return -(-offset // _ALIGN) * _ALIGN
