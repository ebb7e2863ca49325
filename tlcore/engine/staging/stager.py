"""Staged copies: a tensor's bytes are taken inside the hook, into pooled host memory.

The copy cannot wait: fused kernels overwrite their inputs right after the module returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..filters.tensors import TensorSpec
from .accelerator import Accelerator, accelerator_of
from .device import DeviceStager
from .host_memory import NO_CHUNK, Chunk, HostPool, aligned

_LOWEST_ADDRESS = 1 << 38
# Steps that wait in one chunk. What else is told of each takes memory too, which the queue's bound in bytes
# does not count: a model of very small steps may be faster than any storage.
MOST_SHARING = 1024


class FreedError(RuntimeError):
    """A tensor's memory was given back before it could be copied."""


def with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or what stands for one that has no memory. Raises FreedError where there is nothing."""
    if tensor.numel() == 0 or not (tensor.is_cpu or accelerator_of(tensor.device.type)):
        return tensor
    # A part of freed memory has its offset for an address, and no memory lies as low as that.
    address = tensor.data_ptr()
    if address >= _LOWEST_ADDRESS or (address and tensor.untyped_storage().nbytes()):
        return tensor
    if tensor._is_zerotensor():
        # Zeros that torch, in its derivatives, never writes down.
        return torch.zeros_like(tensor)
    raise FreedError("the tensor's memory was freed")


class Stager:
    """Copies tensors into chunks and hands out the filled ones at the caller's boundaries.

    ``chunk`` is the one being filled; who copies into it by itself moves its ``bytes`` on as `stage`
    does. ``full`` are those filled before it, not yet handed out. ``waited`` are the seconds that this
    step has waited for memory.

    Small steps share a chunk. That keeps the memory written to in the processor's cache, and a queue of
    them as small as they are.
    """

    def __init__(
        self,
        pool: HostPool,
        block_s: float,
        accelerators: Callable[[str], Accelerator | None] = accelerator_of,
    ) -> None:
        self.chunk = NO_CHUNK
        # Told of every other chunk that is filled from now on.
        self.on_chunk: Callable[[Chunk], object] = lambda chunk: None
        self.waited = 0.0
        self._pool = pool
        self._block_s = block_s
        # One list for good: the extension looks at it.
        self.full: list[Chunk] = []
        self._largest = 0
        # Where in the chunk the bytes begin that were not handed out, and how many the last step had.
        self._begin = NO_CHUNK.bytes
        self._last_step = 0
        self._accelerators = accelerators
        # None for a device whose tensors the host copies.
        self._devices: dict[torch.device, DeviceStager | None] = {}

    def begin_step(self) -> None:
        """Start the step's waiting time afresh, and its bytes at a good place."""
        self.waited = 0.0
        chunk = self.chunk
        if chunk is NO_CHUNK:
            return
        if not self._pool.rewind(chunk):
            # A chunk that the step would only begin in would be kept from others by two steps.
            full = chunk.size - chunk.bytes < self._last_step or chunk.batches >= MOST_SHARING
            if full or self._pool.limit < 2 * chunk.size:
                self.leave()
        self._begin = self.chunk.bytes

    def stage(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        """Copy ``tensor`` (any strides, any device) contiguously; its chunk and offset, None if dropped."""
        if not tensor.is_cpu:
            stager = self._stager_of(tensor.device)
            if stager is not None:
                return stager.stage(tensor, spec)
        nbytes = spec.nbytes
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
                # Waits for the device, so no later kernel can overtake.
                tensor = tensor.contiguous().cpu()
            if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
                spec.move(chunk.address + begin, tensor.data_ptr(), nbytes)
            else:
                target = chunk.tensor[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor)
        chunk.bytes = aligned(begin + nbytes)
        return chunk, begin

    def reserve(self, device: torch.device) -> None:
        """Take the memory that snapshots of this device's tensors need, before the first of them."""
        if device.type != "cpu":
            self._stager_of(device)

    def _stager_of(self, device: torch.device) -> DeviceStager | None:
        try:
            return self._devices[device]
        except KeyError:
            accelerator = self._accelerators(device.type)
        made = None
        if accelerator is not None:
            self._pool.pinned = True
            size = self._pool.chunk_bytes
            made = DeviceStager(accelerator, device, size, self._acquire, self.full.append)
        self._devices[device] = made
        return made

    def _acquire(self, nbytes: int) -> Chunk | None:
        self._largest = max(self._largest, nbytes)
        chunk, waited = self._pool.acquire(nbytes, max(0.0, self._block_s - self.waited))
        self.waited += waited
        return chunk

    def leave(self) -> None:
        """Begin with another chunk next time."""
        if self.chunk is not NO_CHUNK:
            self._pool.leave(self.chunk)
            self._fill(NO_CHUNK)
            self._begin = NO_CHUNK.bytes

    def _next(self, nbytes: int) -> Chunk | None:
        if self.chunk.bytes == self._begin:
            # Nothing in it is this step's, so it may be the very one to wait for.
            self.leave()
        chunk = self._acquire(nbytes)
        if chunk is None:
            return None
        if self.chunk is not NO_CHUNK:
            self.full.append(self.chunk)
        self._fill(chunk)
        self._begin = 0
        return chunk

    def _fill(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.on_chunk(chunk)

    @property
    def must_hand_over(self) -> bool:
        """Whether full chunks should go to the pipeline before the step ends.

        Storing competes with the model for processors and memory, so it waits for the step's end as
        long as the pool has chunks left.
        """
        return bool(self.full) and not self._pool.has_room(self._largest)

    def take(self, everything: bool) -> Sequence[Chunk]:
        """The full chunks, and with ``everything`` (at a step's end) the one being filled too.

        Of device tensors every byte is sent: until then nothing of them is in host memory.
        """
        for device in self._devices.values():
            if device is not None:
                device.send()
        chunks = self.full.copy()
        self.full.clear()
        for chunk in chunks:
            self._pool.submitted(chunk)
            self._pool.leave(chunk)
        if everything and self.chunk.bytes != self._begin:
            self._last_step = self.chunk.bytes - self._begin
            for chunk in chunks:
                self._last_step += chunk.bytes
            self._pool.submitted(self.chunk)
            chunks.append(self.chunk)
            self._begin = self.chunk.bytes
        return chunks
