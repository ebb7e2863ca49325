"""Staged copies: a tensor's bytes are taken inside the hook, into pooled host memory.

The copy cannot wait: fused kernels overwrite their inputs right after the module returns. It goes
into chunks that are allocated once and recycled, because fresh memory costs several times the copy
itself in page faults. The pool's bound is the queue's bound: a chunk is either free, being filled,
or on its way through the pipeline.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Sequence

import torch

from .forms import Form

CHUNK_BYTES = 32 << 20
_ALIGN = 64


class Chunk:
    """A piece of host memory that is filled from the front with tensor bytes."""

    __slots__ = ("_memory", "address", "bytes", "size", "tensor", "view")

    def __init__(self, size: int) -> None:
        # Private, so that a forked child can never write into what the parent is about to store.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, size, **private)
        if size >= 2 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer page faults; some kernels are built without it and refuse.
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.bytes = 0
        self.view = memoryview(self._memory)
        # A tensor made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()

    def ready(self) -> None:
        """Return once the bytes are there; host copies are when they were made."""


# Stands for "no chunk yet": full from the beginning.
NO_CHUNK = Chunk(1)
NO_CHUNK.bytes = NO_CHUNK.size + 1


class HostPool:
    """Chunks bounded in bytes; waiting for one is what slows a model that outruns its storage."""

    def __init__(self, limit: int, on_full: str) -> None:
        self.limit = limit
        self._drop_at_once = on_full == "drop"
        self._free: list[Chunk] = []
        self._allocated = 0
        self._in_flight = 0
        self._changed = threading.Condition()
        self.chunk_bytes = max(1, min(CHUNK_BYTES, limit))

    def acquire(self, nbytes: int, wait_s: float) -> tuple[Chunk | None, float]:
        """A chunk of at least ``nbytes`` bytes and the seconds waited; None when the queue stays full.

        A chunk beyond the bound is given when nothing is in flight, so that a tensor larger than the
        whole queue still gets through.
        """
        size = max(nbytes, self.chunk_bytes)
        begin = time.monotonic()
        with self._changed:
            while True:
                chunk = self._take(nbytes, size)
                waited = time.monotonic() - begin
                if chunk is not None:
                    return chunk, waited
                if self._drop_at_once or waited >= wait_s:
                    return None, waited
                self._changed.wait(wait_s - waited)

    def _take(self, nbytes: int, size: int) -> Chunk | None:
        for index, chunk in enumerate(self._free):
            if chunk.size >= nbytes:
                return self._free.pop(index)
        while self._free and self._allocated + size > self.limit:
            self._allocated -= self._free.pop().size
        if self._allocated + size > self.limit and self._in_flight:
            return None
        self._allocated += size
        return Chunk(size)

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk for ``nbytes`` bytes could be had without waiting."""
        with self._changed:
            fits = self._allocated + max(nbytes, self.chunk_bytes) <= self.limit
            return fits or any(chunk.size >= nbytes for chunk in self._free)

    def submitted(self, chunk: Chunk) -> None:
        """Note that the pipeline has the chunk now and will release it."""
        with self._changed:
            self._in_flight += chunk.size

    def release(self, chunk: Chunk) -> None:
        """Take a chunk back; its memory may be overwritten from here on."""
        with self._changed:
            self._in_flight -= chunk.size
            chunk.bytes = 0
            if self._allocated > self.limit:
                self._allocated -= chunk.size
            else:
                self._free.append(chunk)
            self._changed.notify_all()

    @property
    def in_flight(self) -> int:
        """Bytes of chunks handed to the pipeline and not yet released."""
        with self._changed:
            return self._in_flight


class Stager:
    """Copies tensors into chunks and hands out the filled ones at the caller's boundaries.

    ``chunk`` is the one being filled; who copies into it by itself moves its ``bytes`` on as `stage`
    does. ``full`` are those filled before it, not yet handed out. ``waited`` are the seconds that this
    step has waited for memory.
    """

    def __init__(self, pool: HostPool, block_s: float) -> None:
        self.chunk = NO_CHUNK
        self.waited = 0.0
        self._pool = pool
        self._block_s = block_s
        self.full: list[Chunk] = []
        self._largest = 0

    def begin_step(self) -> None:
        """Start the step's waiting time afresh."""
        self.waited = 0.0

    def stage(self, tensor: torch.Tensor, form: Form) -> tuple[Chunk, int] | None:
        """Copy ``tensor`` (any strides, any device) contiguously; its chunk and offset, None if dropped."""
        nbytes = form.nbytes
        chunk = self.chunk
        if chunk.bytes + nbytes > chunk.size:
            fresh = self._next(nbytes)
            if fresh is None:
                return None
            chunk = fresh
        begin = chunk.bytes
        if nbytes:
            tensor = tensor.detach()
            if not tensor.is_cpu:
                # Runs on the model's own stream and waits for it, so no later kernel can overtake.
                tensor = tensor.contiguous().cpu()
            if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
                form.move(chunk.address + begin, tensor.data_ptr(), nbytes)
            else:
                target = chunk.tensor[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor)
        chunk.bytes = aligned(begin + nbytes)
        return chunk, begin

    def _next(self, nbytes: int) -> Chunk | None:
        self._largest = max(self._largest, nbytes)
        chunk, waited = self._pool.acquire(nbytes, max(0.0, self._block_s - self.waited))
        self.waited += waited
        if chunk is None:
            return None
        if self.chunk is not NO_CHUNK:
            self.full.append(self.chunk)
        self.chunk = chunk
        return chunk

    @property
    def must_hand_over(self) -> bool:
        """Whether full chunks should go to the pipeline before the step ends.

        Storing competes with the model for processors and memory, so it waits for the step's end as
        long as the pool has chunks left.
        """
        return bool(self.full) and not self._pool.has_room(self._largest)

    def take(self, everything: bool) -> Sequence[Chunk]:
        """The full chunks, and with ``everything`` the one being filled too."""
        chunks, self.full = self.full, []
        if everything and self.chunk is not NO_CHUNK:
            chunks.append(self.chunk)
            self.chunk = NO_CHUNK
        for chunk in chunks:
            self._pool.submitted(chunk)
        return chunks


def aligned(offset: int) -> int:
    """The first offset at or after ``offset`` where a tensor may begin."""
    return -(-offset // _ALIGN) * _ALIGN
