"""Staged copies of a device's tensors: a snapshot on the model's stream, then to the host on another one.

The snapshot must be on the stream that the module runs on: a copy that starts elsewhere would race with the
next kernel that works in place. It goes into a device buffer, which is as fast as device memory, and from
there in one piece into pinned memory, while the model's streams go on. Nothing here makes the host wait.

Each snapshot is a launch of its own. Between two sides of calls any kernel may write in place, so only the
tensors of one side could share a launch soundly; in a Llama that would spare less than a fifth of them.

What must wait for what, and nothing else does:

* the first snapshot that a stream makes into a buffer, for the transfer of what was in it before;
* a buffer's transfer, for every stream that has made snapshots into it, not for the current one alone;
* who reads a chunk on the host, for its transfer (`Chunk.ready`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from ..filters.tensors import TensorSpec
from .accelerator import Accelerator, Event, Stream
from .host_memory import NO_CHUNK, Chunk, aligned

# Enough that a buffer is rarely waited for: while one is filled, the others travel.
_BUFFERS = 4


class DeviceStager:
    """Stages the tensors of one device into chunks of pinned host memory.

    The device memory (`_BUFFERS` times ``chunk_bytes``) is taken at once and kept, so that whoever sizes
    a cache by the memory that is left sees it. A larger tensor is copied to the host on the model's stream.
    ``acquire`` gives a host chunk of at least so many bytes (None when the queue is full), ``hand_on`` gets
    each chunk whose bytes are on their way.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        device: torch.device,
        chunk_bytes: int,
        acquire: Callable[[int], Chunk | None],
        hand_on: Callable[[Chunk], None],
    ) -> None:
        self._accelerator = accelerator
        self._acquire = acquire
        self._hand_on = hand_on
        self._chunk_bytes = chunk_bytes
        self._side = accelerator.new_stream(device)
        self._buffers = [accelerator.memory(chunk_bytes, device) for _ in range(_BUFFERS)]
        for buffer in self._buffers:
            accelerator.keep_for(buffer, self._side)
        self._device = device
        self._travelled: list[Event | None] = [None] * _BUFFERS
        self._turns = itertools.cycle(range(_BUFFERS))
        self._turn = 0
        # The streams that have made snapshots into the buffer whose turn it is.
        self._writers: set[Stream] = set()
        self._chunk = NO_CHUNK

    def stage(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        """Snapshot a tensor (any strides) contiguously; its chunk and offset, None if dropped.

        Raises RuntimeError while the stream is being recorded into a graph.
        """
        if self._accelerator.recording():
            raise RuntimeError("a graph is being recorded")
        nbytes = spec.nbytes
        if nbytes > self._chunk_bytes:
            return self._stage_alone(tensor, spec)
        fits = self._chunk is not NO_CHUNK and self._chunk.bytes + nbytes <= self._chunk_bytes
        if not fits and not self._next():
            return None
        chunk = self._chunk
        begin = chunk.bytes
        if nbytes:
            self._join(self._accelerator.current_stream(self._device))
            self._accelerator.copy(self._buffers[self._turn], begin, tensor, nbytes)
        chunk.bytes = aligned(begin + nbytes)
        return chunk, begin

    def _join(self, stream: Stream) -> None:
        """A stream is about to write into the buffer whose turn it is."""
        if stream in self._writers:
            return
        self._writers.add(stream)
        self._accelerator.keep_for(self._buffers[self._turn], stream)
        travelled = self._travelled[self._turn]
        if travelled is not None:
            stream.wait_event(travelled)

    def _stage_alone(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        chunk = self._acquire(spec.nbytes)
        if chunk is None:
            return None
        # A strided copy between device and host would be made element by element.
        self._accelerator.copy(chunk.tensor, 0, tensor.contiguous(), spec.nbytes)
        chunk.bytes = aligned(spec.nbytes)
        chunk.written = self._accelerator.current_stream(self._device).record_event()
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
        self._writers.clear()
        return True

    def send(self) -> None:
        """Start the copy of what has been gathered to the host, behind every stream that it was made on.

        The chunk is handed on; it is readable once its `Chunk.ready` returns.
        """
        chunk = self._chunk
        if chunk is NO_CHUNK:
            return
        self._chunk = NO_CHUNK
        used = min(chunk.bytes, self._chunk_bytes)
        for stream in self._writers:
            self._side.wait_event(stream.record_event())
        with self._accelerator.on(self._side):
            self._accelerator.copy(chunk.tensor, 0, self._buffers[self._turn][:used], used)
        chunk.written = self._side.record_event()
        self._travelled[self._turn] = chunk.written
        self._hand_on(chunk)
