"""A device that does not exist: streams, events and memory, with work done in any order that is allowed.

Work that is given to a stream waits in it. Whenever the host does something, a seeded scheduler does some of
the work that nothing holds back; when the host waits for an event, it does what it takes, in any order.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICE = torch.device("cuda:0")


@dataclass(eq=False)
class SimulatedEvent:
    """A place in a stream's work, reached or not."""

    device: SimulatedDevice
    reached: bool = False

    def synchronize(self) -> None:
        """Do work until it is reached."""
        self.device.host_waits += 1
        if "no host wait" not in self.device.faults:
            self.device.run(until=lambda: self.reached)


@dataclass(eq=False)
class SimulatedStream:
    """Work in the order in which it was given: calls, and events to wait for."""

    device: SimulatedDevice
    name: str
    work: deque[SimulatedEvent | Callable[[], None]] = field(default_factory=deque)

    def give(self, work: SimulatedEvent | Callable[[], None]) -> None:
        """Add work at the end."""
        self.work.append(work)
        self.device.idle()

    def record_event(self) -> SimulatedEvent:
        """An event after the work given so far."""
        event = SimulatedEvent(self.device)

        def reach() -> None:
            event.reached = True

        if "early event" in self.device.faults and self.name == "side":
            reach()
        self.give(reach)
        return event

    def wait_event(self, event: SimulatedEvent) -> None:
        """Make later work wait."""
        side = self.name == "side"
        skipped = ("no wait for the model" if side else "no wait for the transfer") in self.device.faults
        if not skipped:
            self.give(event)

    @property
    def ready(self) -> bool:
        """Whether its next piece of work can be done."""
        return bool(self.work) and (not isinstance(self.work[0], SimulatedEvent) or self.work[0].reached)

    def step(self) -> None:
        """Do its next piece of work."""
        work = self.work.popleft()
        if not isinstance(work, SimulatedEvent):
            work()


class SimulatedTensor:
    """A tensor of bytes in the device's memory; what staging asks of one."""

    is_cpu, device = False, DEVICE

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory

    def contiguous(self) -> SimulatedTensor:
        """Itself: bytes in a row are."""
        return self

    def __getitem__(self, piece: slice) -> SimulatedTensor:
        return SimulatedTensor(self.memory[piece])


class SimulatedDevice:
    """Streams and memory, and the `Accelerator` that staging reaches them by; ``faults`` breaks it."""

    measures = True

    def __init__(self, seed: int, streams: int, faults: frozenset[str] = frozenset()) -> None:
        self.chance = random.Random(seed)
        self.faults = faults
        self.streams = [SimulatedStream(self, f"model {number}") for number in range(streams)]
        self.current = self.streams[0]
        self.models = list(self.streams)
        # How eager each stream is, so that one may fall far behind the others.
        self.eagerness: dict[SimulatedStream, float] = {}
        self.host_waits = 0
        self.taken = 0

    def idle(self) -> None:
        """The host has done something: so does the device, or not."""
        while self.chance.random() < 0.5 and self._advance():
            pass

    def run(self, until: Callable[[], bool]) -> None:
        """Do work until it is so."""
        while not until():
            assert self._advance(hurried=True), "everything waits for something else"

    def finish(self) -> None:
        """Do all work."""
        self.run(lambda: not any(stream.work for stream in self.streams))

    def _advance(self, hurried: bool = False) -> bool:
        ready = [stream for stream in self.streams if stream.ready]
        if not ready:
            return False
        stream = self.chance.choice(ready)
        eager = self.eagerness.setdefault(stream, self.chance.choice([0.05, 0.5, 1.0]))
        if hurried or self.chance.random() < eager:
            stream.step()
        return True

    def tensor(self, nbytes: int) -> SimulatedTensor:
        """Memory of the model's."""
        return SimulatedTensor(memoryview(bytearray(nbytes)))

    def fill(self, tensor: SimulatedTensor, value: int) -> None:
        """A kernel of the model's on the current stream, which overwrites a tensor."""

        def work() -> None:
            tensor.memory[:] = bytes((value,)) * len(tensor.memory)

        self.current.give(work)

    def recording(self) -> bool:
        """No graph is ever recorded."""
        return False

    def current_stream(self, device: torch.device) -> SimulatedStream:
        """The stream that the host gives its work to."""
        return self.current

    def new_stream(self, device: torch.device) -> SimulatedStream:
        """A stream beside the model's."""
        made = SimulatedStream(self, "side")
        self.streams.append(made)
        return made

    @contextlib.contextmanager
    def _on(self, stream: SimulatedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Within the block, work goes to this stream."""
        return self._on(stream)

    def memory(self, nbytes: int, device: torch.device) -> Any:
        """Bytes on the device."""
        self.taken += nbytes
        return SimulatedTensor(memoryview(bytearray(nbytes)))

    def keep_for(self, memory: Any, stream: Any) -> None:
        """Nothing here is given back before the device has finished."""

    def copy(self, target: Any, begin: int, source: Any, nbytes: int) -> None:
        """Copy bytes in the current stream's turn: what lies there then, not what lies there now."""
        into = target.memory if isinstance(target, SimulatedTensor) else memoryview(target.numpy())

        def work() -> None:
            into[begin : begin + nbytes] = source.memory[:nbytes]

        self.current.give(work)
