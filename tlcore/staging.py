"""Staged copies: a tensor's bytes are taken inside the hook, into pooled host memory.

The copy cannot wait: fused kernels overwrite their inputs right after the module returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .device_staging import DeviceStager
from .forms import Form
from .host_memory import NO_CHUNK, Chunk, HostPool, aligned


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
        self._devices: dict[torch.device, DeviceStager] = {}

    def begin_step(self) -> None:
        """Start the step's waiting time afresh."""
        self.waited = 0.0

    def stage(self, tensor: torch.Tensor, form: Form) -> tuple[Chunk, int] | None:
        """Copy ``tensor`` (any strides, any device) contiguously; its chunk and offset, None if dropped."""
        if tensor.is_cuda:
            self.reserve(tensor.device)
            return self._devices[tensor.device].stage(tensor, form)
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
                # Waits for the device, so no later kernel can overtake.
                tensor = tensor.contiguous().cpu()
            if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
                form.move(chunk.address + begin, tensor.data_ptr(), nbytes)
            else:
                target = chunk.tensor[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor)
        chunk.bytes = aligned(begin + nbytes)
        return chunk, begin

    def reserve(self, device: torch.device) -> None:
        """Take the memory that snapshots of this device's tensors need, before the first of them."""
        if device.type == "cuda" and device not in self._devices:
            self._pool.pinned = True
            self._devices[device] = DeviceStager(
                device, self._pool.chunk_bytes, self._acquire, lambda chunk: self.full.append(chunk)
            )

    def _acquire(self, nbytes: int) -> Chunk | None:
        self._largest = max(self._largest, nbytes)
        chunk, waited = self._pool.acquire(nbytes, max(0.0, self._block_s - self.waited))
        self.waited += waited
        return chunk

    def _next(self, nbytes: int) -> Chunk | None:
        chunk = self._acquire(nbytes)
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
        """The full chunks, and with ``everything`` the one being filled too.

        Of device tensors every byte is sent: until then nothing of them is in host memory.
        """
        for device in self._devices.values():
            device.send()
        chunks, self.full = self.full, []
        if everything and self.chunk is not NO_CHUNK:
            chunks.append(self.chunk)
            self.chunk = NO_CHUNK
        for chunk in chunks:
            self._pool.submitted(chunk)
        return chunks
