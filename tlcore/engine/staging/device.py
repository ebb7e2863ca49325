"""Staged copies of CUDA tensors: a snapshot on the model's stream, then to the host on another one.

The snapshot must be on the model's own stream: a copy that starts elsewhere would race with the next
kernel that works in place. It goes into a device buffer, which is as fast as device memory, and from there
in one piece into pinned memory, while the model's stream goes on. Nothing here makes the host wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from ..filters.tensors import TensorSpec
from .host_memory import NO_CHUNK, Chunk, aligned

# Enough that a buffer is rarely waited for: while one is filled, the others travel.
_BUFFERS = 4


class DeviceStager:
    """Stages the tensors of one CUDA device into chunks of pinned host memory.

    The device memory (`_BUFFERS` times ``chunk_bytes``) is taken at once and kept, so that whoever sizes
    a cache by the memory that is left sees it. A larger tensor is copied to the host on the model's stream.
    ``acquire`` gives a host chunk of at least so many bytes (None when the queue is full), ``hand_on`` gets
    each chunk whose bytes are on their way.
    """

    def __init__(
        self,
        device: torch.device,
        chunk_bytes: int,
        acquire: Callable[[int], Chunk | None],
        hand_on: Callable[[Chunk], None],
    ) -> None:
        self._acquire = acquire
        self._hand_on = hand_on
        self._chunk_bytes = chunk_bytes
        with torch.inference_mode(False), torch.cuda.device(device):
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._buffers = [
                torch.empty(chunk_bytes, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)
            ]
        self._device = device
        self._travelled: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._turns = itertools.cycle(range(_BUFFERS))
        self._turn = 0
        self._chunk = NO_CHUNK

    def stage(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        """Snapshot a tensor (any strides) contiguously; its chunk and offset, None if dropped.

        Raises RuntimeError while the stream is being captured into a CUDA graph.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is being captured")
        nbytes = spec.nbytes
        if nbytes > self._chunk_bytes:
            return self._stage_alone(tensor, spec)
        fits = self._chunk is not NO_CHUNK and self._chunk.bytes + nbytes <= self._chunk_bytes
        if not fits and not self._next():
            return None
        chunk = self._chunk
        begin = chunk.bytes
        if nbytes:
            _copy(self._buffers[self._turn], begin, tensor, nbytes)
        chunk.bytes = aligned(begin + nbytes)
        return chunk, begin

    def _stage_alone(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        chunk = self._acquire(spec.nbytes)
        if chunk is None:
            return None
        # A strided copy between device and host would be made element by element.
        _copy(chunk.tensor, 0, tensor.contiguous(), spec.nbytes)
        chunk.bytes = aligned(spec.nbytes)
        chunk.written = torch.cuda.current_stream(self._device).record_event()
        self._hand_on(chunk)
        return chunk, 0

    def _next(self) -> bool:
        """Send the buffer on its way and begin another; False when there is no host memory for it."""
        chunk = self._acquire(self._chunk_bytes)
        if chunk is None:
            return False
        self.send()
        self._chunk = chunk
        self._turn = next(self._turns)
        travelled = self._travelled[self._turn]
        if travelled is not None:
            torch.cuda.current_stream(self._device).wait_event(travelled)
        return True

    def send(self) -> None:
        """Start the copy of what has been gathered to the host, behind the model's stream.

        The chunk is handed on; it is readable once its `Chunk.ready` returns.
        """
        chunk = self._chunk
        if chunk is NO_CHUNK:
            return
        self._chunk = NO_CHUNK
        used = min(chunk.bytes, self._chunk_bytes)
        with torch.cuda.stream(self._side):
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            chunk.tensor[:used].copy_(self._buffers[self._turn][:used], non_blocking=True)
            chunk.written = self._side.record_event()
        self._travelled[self._turn] = chunk.written
        self._hand_on(chunk)


def _copy(buffer: torch.Tensor, begin: int, tensor: torch.Tensor, nbytes: int) -> None:
    target = buffer[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
    target.copy_(tensor.detach(), non_blocking=True)
