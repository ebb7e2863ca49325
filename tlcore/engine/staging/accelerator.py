"""What staging asks of a device: streams, events, memory and copies. The only place that knows their names.

From torch 2.6 on the generic ones are used, which CUDA, ROCm, XPU and devices registered from outside torch
(such as Ascend NPUs) have; before, those of CUDA. A device without streams (MPS) has no accelerator here: its
tensors are copied by the host, which waits for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A place in the work of a stream."""

    def synchronize(self) -> None:
        """Make the host wait until the stream has got there."""


class Stream(Hashable, Protocol):
    """Work that a device does in the order in which it was given."""

    def record_event(self) -> Event:
        """An event after all work given so far."""

    def wait_event(self, event: Any) -> None:
        """Make all work given from now on wait for the event."""


class Accelerator(Protocol):
    """A kind of device that works by itself, in streams."""

    @property
    def measures(self) -> bool:
        """Whether it can compute a tensor's statistics, which takes float64."""

    def recording(self) -> bool:
        """Whether the current stream's work is being recorded into a graph instead of done."""

    def current_stream(self, device: torch.device) -> Stream:
        """The stream that the calling thread gives its work to."""

    def new_stream(self, device: torch.device) -> Stream:
        """A stream beside the model's."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Within the block, the calling thread gives its work to this stream."""

    def memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Bytes on the device."""

    def keep_for(self, memory: torch.Tensor, stream: Any) -> None:
        """Let memory that is given back wait for this stream's work too before anything else gets it."""

    def copy(self, target: torch.Tensor, begin: int, source: torch.Tensor, nbytes: int) -> None:
        """Give the current stream the copy of a tensor (any strides) into bytes of ``target``."""


class TorchAccelerator:
    """The devices of one type, as torch has them."""

    def __init__(self, kind: str) -> None:
        self._module: Any = getattr(torch, kind)
        self._generic: Any = torch.accelerator if hasattr(torch, "accelerator") else self._module
        self._recording = getattr(self._module, "is_current_stream_capturing", None)
        self._kind = kind

    @property
    def measures(self) -> bool:
        """Whether it has float64, which some of Intel's devices lack."""
        return self._kind == "cuda" or _has_float64(self._kind)

    def recording(self) -> bool:
        """Whether a CUDA graph (or what corresponds to it) is being recorded."""
        # Asking would initialise a device that nobody has used.
        return self._recording is not None and self._module.is_initialized() and bool(self._recording())

    def current_stream(self, device: torch.device) -> Any:
        """The stream that the calling thread gives its work to."""
        return self._generic.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        """A stream beside the model's."""
        return self._module.Stream(device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Within the block, the calling thread gives its work to this stream."""
        block: AbstractContextManager[Any] = self._module.stream(stream)
        return block

    def memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Bytes on the device, which may be written in any mode."""
        with torch.inference_mode(False), self._module.device(device):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def keep_for(self, memory: torch.Tensor, stream: Any) -> None:
        """Let memory that is given back wait for this stream's work too before anything else gets it."""
        memory.record_stream(stream)

    def copy(self, target: torch.Tensor, begin: int, source: torch.Tensor, nbytes: int) -> None:
        """Give the current stream the copy of a tensor (any strides) into bytes of ``target``."""
        piece = target[begin : begin + nbytes].view(source.dtype).view(source.shape)
        piece.copy_(source.detach(), non_blocking=True)


@cache
def _has_float64(kind: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(getattr(getattr(torch, kind).get_device_properties(), "has_fp64", True))
    return True


@cache
def accelerator_of(kind: str) -> Accelerator | None:
    """The accelerator of a device type (``"cuda"``), None where the host copies by itself."""
    if kind == "cuda":
        return TorchAccelerator(kind)
    if not hasattr(torch, "accelerator") or not hasattr(getattr(torch, kind, None), "Stream"):
        return None
    current = torch.accelerator.current_accelerator()
    known = current is not None and current.type == kind
    return TorchAccelerator(kind) if known and hasattr(torch.get_device_module(kind), "stream") else None


def device_name(device: torch.device) -> str:
    """What the maker calls it (``"NVIDIA H200"``), its type where torch does not tell."""
    with contextlib.suppress(Exception):
        return str(getattr(torch, device.type).get_device_name(device))
    return device.type


def recording() -> bool:
    """Whether the current stream's work is being recorded into a graph instead of done."""
    found = False
    for each in _recorders():
        found = found or each.recording()
    return found


@cache
def _recorders() -> tuple[Accelerator, ...]:
    """Those of the device types whose work may be recorded. Those of a build of torch stay the same."""
    current = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    kinds = ["cuda"] if torch.version.cuda or torch.version.hip else []
    if current is not None and current.type != "cuda":
        kinds.append(current.type)
    return tuple(each for each in map(accelerator_of, kinds) if each is not None)
