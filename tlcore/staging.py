"""Staged copies: a tensor's bytes are taken inside the hook, into pooled host memory.

The copy cannot wait: fused kernels overwrite their inputs right after the module returns. It goes
into chunks that are allocated once and recycled, because fresh memory costs several times the copy
itself in page faults. The pool's bound is the queue's bound: a chunk is either free, being filled,
or on its way through the pipeline.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from dataclasses import dataclass

import torch

CHUNK_BYTES = 32 << 20
_ALIGN = 64
_memmove = ctypes.memmove


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


@dataclass(slots=True)
class Slot:
    """One tensor of a call: its metadata, and where its copy lies or why there is none.

    ``skipped`` and ``failed`` hold a reason; ``dropped`` means that the queue was full. ``counted`` is
    False for a tensor that the filters reject, which the ledger never sees. ``name`` is the logical
    name, given by the pipeline.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    nbytes: int
    chunk: Chunk | None = None
    offset: int = 0
    skipped: str | None = None
    dropped: bool = False
    failed: str | None = None
    counted: bool = True
    name: str = ""

    def data(self) -> memoryview:
        """The staged bytes; valid until the chunk goes back to its pool."""
        if self.chunk is None:
            raise ValueError("this tensor was not staged")
        return self.chunk.view[self.offset : self.offset + self.nbytes]


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
    """Copies tensors into chunks and hands out the filled ones at the caller's boundaries."""

    def __init__(self, pool: HostPool, block_s: float) -> None:
        self._pool = pool
        self._block_s = block_s
        self._chunk: Chunk | None = None
        self._full: list[Chunk] = []
        self.waited = 0.0

    def begin_step(self) -> None:
        """Start the step's waiting time afresh."""
        self.waited = 0.0

    def stage(self, tensor: torch.Tensor, slot: Slot) -> None:
        """Copy ``tensor`` (any strides, any device) contiguously into the slot, or mark it dropped."""
        nbytes = slot.nbytes
        chunk = self._chunk
        if chunk is None or chunk.bytes + nbytes > chunk.size:
            chunk = self._next(nbytes)
            if chunk is None:
                slot.dropped = True
                return
        begin = chunk.bytes
        if nbytes:
            if slot.device != "cpu":
                # Runs on the model's own stream and waits for it, so no later kernel can overtake.
                tensor = tensor.detach().contiguous().cpu()
            if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
                _memmove(chunk.address + begin, tensor.data_ptr(), nbytes)
            else:
                target = chunk.tensor[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor.detach())
        slot.chunk = chunk
        slot.offset = begin
        chunk.bytes = -(-(begin + nbytes) // _ALIGN) * _ALIGN

    def _next(self, nbytes: int) -> Chunk | None:
        chunk, waited = self._pool.acquire(nbytes, max(0.0, self._block_s - self.waited))
        self.waited += waited
        if chunk is None:
            return None
        if self._chunk is not None:
            self._full.append(self._chunk)
        self._chunk = chunk
        return chunk

    @property
    def has_full(self) -> bool:
        """Whether a chunk is full, so that a batch is worth handing over."""
        return bool(self._full)

    def take(self, everything: bool) -> list[Chunk]:
        """The full chunks, and with ``everything`` the one being filled too."""
        chunks, self._full = self._full, []
        if everything and self._chunk is not None:
            chunks.append(self._chunk)
            self._chunk = None
        for chunk in chunks:
            self._pool.submitted(chunk)
        return chunks
