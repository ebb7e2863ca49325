"""The real staging on a simulated device: what arrives is what was there at the call.

Each schedule is a model on several streams, whose kernels write in place over what was just captured, with
snapshots, transfers, chunks used again by both device and host, and a host that reads late, in an order of
its own. Faults that are built in on purpose are each found.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from tests.deep import scaled
from tests.engine.staging.simulated import DEVICE, SimulatedDevice
from tlcore.engine.filters.tensors import TensorFilter, TensorSpec, TensorSpecs
from tlcore.engine.staging import device as device_staging
from tlcore.engine.staging.device import DeviceStager
from tlcore.engine.staging.host_memory import Chunk, HostPool
from tlcore.engine.staging.stager import Stager

SCHEDULES = scaled(2000, 1_000_000)
FOUND_WITHIN = 2000
CHUNK = 1 << 10
LIMIT = 6 * CHUNK

SPECS = TensorSpecs(TensorFilter(frozenset(), None, None))


class WrongError(AssertionError):
    """What arrived is not what was there at the call."""


@cache
def spec_of(nbytes: int) -> TensorSpec:
    return SPECS.find(torch.empty(nbytes, dtype=torch.uint8))


class Model:
    """A model whose modules run on several streams, and the host that reads what was captured of it."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.chance = device, device.chance
        self.pool = HostPool(LIMIT, "drop")
        self.pool.chunk_bytes = CHUNK
        self.stager = Stager(self.pool, 0.0, lambda kind: device)
        self.tensors = {stream: [device.tensor(3 * CHUNK) for _ in range(3)] for stream in device.models}
        self.values: dict[Any, int] = {}
        # One for each write, so that no wrong value is right by accident; a byte has to do.
        self.next_value = itertools.cycle(range(1, 256))
        self.batches: list[tuple[list[Chunk], list[tuple[Chunk, int, int, int]]]] = []
        self.taken: list[tuple[Chunk, int, int, int]] = []
        self.stored = self.dropped = 0

    def step(self) -> None:
        self.stager.begin_step()
        for _ in range(self.chance.randrange(1, 12)):
            self.device.current = self.chance.choice(self.device.models)
            self.module()
            if self.chance.random() < 0.2:
                self.hand_over(everything=False)
            if self.chance.random() < 0.2 and self.batches:
                self.read(self.batches.pop(0))
        # The step ends on any of its streams.
        self.device.current = self.chance.choice(self.device.models)
        self.hand_over(everything=True)
        while len(self.batches) > self.chance.randrange(4):
            self.read(self.batches.pop(0))

    def module(self) -> None:
        """One writes a tensor, it is captured, the next writes over it in place; or one of the host's."""
        nbytes = self.chance.choice([1, 64, 300, CHUNK, 2 * CHUNK])
        value = next(self.next_value)
        if self.chance.random() < 0.2:
            place = self.stager.stage(torch.full((nbytes,), value, dtype=torch.uint8), spec_of(nbytes))
        else:
            tensor = self.chance.choice(self.tensors[self.device.current])
            if self.chance.random() < 0.8 or tensor not in self.values:
                self.device.fill(tensor, value)
                self.values[tensor] = value
            value = self.values[tensor]
            place = self.stager.stage(tensor, spec_of(nbytes))  # type: ignore[arg-type]
            if self.chance.random() < 0.5:
                self.values[tensor] = next(self.next_value)
                self.device.fill(tensor, self.values[tensor])
        if place is None:
            self.dropped += 1
        else:
            self.taken.append((*place, nbytes, value))

    def hand_over(self, everything: bool) -> None:
        chunks = list(self.stager.take(everything))
        ready = [place for place in self.taken if place[0] in chunks]
        self.taken = [place for place in self.taken if place[0] not in chunks]
        self.batches.append((chunks, ready))

    def read(self, batch: tuple[list[Chunk], list[tuple[Chunk, int, int, int]]]) -> None:
        chunks, places = batch
        untried = self.chance.random() < 0.1
        for chunk in [] if untried else chunks:
            chunk.ready()
        for chunk, offset, nbytes, value in [] if untried else places:
            found = bytes(chunk.view[offset : offset + nbytes])
            if found != bytes((value,)) * nbytes:
                raise WrongError(f"{value} was written, {sorted(set(found))} arrived")
            self.stored += 1
        for chunk in chunks:
            self.pool.release(chunk)
            self.device.idle()


def run_schedule(seed: int, faults: frozenset[str] = frozenset()) -> Model:
    streams = 1 + seed % 3
    model = Model(SimulatedDevice(seed, streams, faults))
    for _ in range(3):
        model.step()
    for batch in model.batches:
        model.read(batch)
    model.device.finish()
    return model


def test_what_arrives_is_the_value_at_the_call_in_any_order() -> None:
    stored = dropped = 0
    for seed in range(SCHEDULES):
        try:
            model = run_schedule(seed)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        stored, dropped = stored + model.stored, dropped + model.dropped
        assert model.pool.allocated <= LIMIT + 2 * CHUNK
        assert model.device.taken <= device_staging._BUFFERS * CHUNK
    assert stored > 5 * SCHEDULES and dropped > 0


def test_the_host_never_waits_to_stage() -> None:
    device = SimulatedDevice(1, 2)
    pool = HostPool(1 << 20, "block")
    pool.chunk_bytes = CHUNK
    stager = Stager(pool, 10.0, lambda kind: device)
    for number in range(200):
        device.current = device.models[number % 2]
        tensor = device.tensor(300)
        device.fill(tensor, number % 256)
        assert stager.stage(tensor, spec_of(300)) is not None  # type: ignore[arg-type]
    assert stager.take(everything=True)
    assert device.host_waits == 0


@pytest.mark.parametrize(
    "fault", ["no wait for the model", "no wait for the transfer", "early event", "no host wait"]
)
def test_a_dependency_that_is_missing_is_found(fault: str) -> None:
    assert _found(frozenset({fault}))


def _found(faults: frozenset[str] = frozenset()) -> int | None:
    for seed in range(FOUND_WITHIN):
        try:
            run_schedule(seed, faults)
        except WrongError:
            return seed + 1
    return None


def _send_behind_the_current_stream(self: DeviceStager) -> None:
    self._writers &= {self._accelerator.current_stream(self._device)}
    self._writers.add(self._accelerator.current_stream(self._device))
    _send(self)


def _join_once_a_buffer(self: DeviceStager, stream: Any) -> None:
    if not self._writers:
        _join(self, stream)
    self._writers.add(stream)


def _clear_without_waiting(self: Chunk) -> None:
    self.written = None


_send, _join = DeviceStager.send, DeviceStager._join


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (DeviceStager, "send", _send_behind_the_current_stream),
        (DeviceStager, "_join", _join_once_a_buffer),
        (Chunk, "clear", _clear_without_waiting),
    ],
    ids=["a transfer behind one stream only", "one stream waits for the buffer", "a chunk used too early"],
)
def test_a_mistake_in_the_staging_is_found(
    owner: type, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    assert _found()


def test_a_device_without_streams_is_copied_by_the_host() -> None:
    """As on MPS: the copy waits for the device, so nothing can overtake it."""
    stager = Stager(HostPool(LIMIT, "drop"), 0.0, lambda kind: None)
    stager.reserve(DEVICE)
    assert stager.take(everything=True) == []
