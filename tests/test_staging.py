"""Staged copies: exact bytes whatever the strides, bounded memory, waiting and dropping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from tlcore.record import tensor_from_bytes
from tlcore.staging import HostPool, Slot, Stager

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.arange(12.0).view(3, 4),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "column": lambda: torch.arange(12.0).view(3, 4)[:, 1],
    "expanded": lambda: torch.arange(4.0).expand(3, 4),
    "zero-dimensional": lambda: torch.tensor(7),
    "zero-size": lambda: torch.empty(0, 5, dtype=torch.bfloat16),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "bool": lambda: torch.tensor([True, False]),
    "complex128": lambda: torch.tensor([1j], dtype=torch.complex128),
    "float8 strided": lambda: torch.arange(8.0).to(torch.float8_e4m3fn)[::2],
    "uint16": lambda: torch.tensor([1, 65535], dtype=torch.uint16),
    "needs grad": lambda: torch.ones(2, 3, requires_grad=True).t(),
}


def slot_for(tensor: torch.Tensor) -> Slot:
    return Slot(tensor.dtype, tensor.shape, str(tensor.device), tensor.numel() * tensor.element_size())


@pytest.mark.parametrize("kind", TENSORS)
def test_a_staged_copy_has_the_tensors_bytes(kind: str) -> None:
    tensor = TENSORS[kind]()
    stager = Stager(HostPool(1 << 20, "block"), 1.0)
    slot = slot_for(tensor)
    stager.stage(tensor, slot)
    expected = tensor.detach().resolve_conj().resolve_neg().contiguous()
    staged = tensor_from_bytes(slot.data(), slot.dtype, slot.shape)
    assert staged.dtype == expected.dtype and staged.shape == expected.shape
    as_bytes = expected.flatten().view(torch.uint8).tolist() if expected.numel() else []
    assert list(slot.data()) == as_bytes


def test_a_later_write_to_the_tensor_does_not_reach_the_copy() -> None:
    tensor = torch.ones(100)
    stager = Stager(HostPool(1 << 20, "block"), 1.0)
    slot = slot_for(tensor)
    stager.stage(tensor, slot)
    tensor.zero_()
    assert tensor_from_bytes(slot.data(), slot.dtype, slot.shape).sum() == 100


def test_staging_in_inference_mode_and_out_of_it_share_a_pool() -> None:
    pool = HostPool(1 << 20, "block")
    stager = Stager(pool, 1.0)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            tensor = torch.arange(6.0).view(2, 3).t()
            slot = slot_for(tensor)
            stager.stage(tensor, slot)
        assert bytes(slot.data()) == tensor.contiguous().numpy().tobytes()
        for chunk in stager.take(everything=True):
            pool.release(chunk)


def test_memory_is_recycled_not_grown() -> None:
    pool = HostPool(4096, "block")
    stager = Stager(pool, 0.0)
    addresses = set()
    for _ in range(50):
        slot = slot_for(torch.ones(512))
        stager.stage(torch.ones(512), slot)
        assert slot.chunk is not None
        addresses.add(slot.chunk.address)
        for chunk in stager.take(everything=True):
            pool.release(chunk)
    assert len(addresses) == 1


def fill(stager: Stager, pieces: int) -> list[Slot]:
    slots = []
    for _ in range(pieces):
        tensor = torch.ones(1024, dtype=torch.uint8)
        slots.append(slot_for(tensor))
        stager.stage(tensor, slots[-1])
        stager.take(everything=True)
    return slots


def test_a_full_queue_drops_at_once_when_told_to() -> None:
    stager = Stager(HostPool(2048, "drop"), 60.0)
    begin = time.monotonic()
    slots = fill(stager, 5)
    assert [slot.dropped for slot in slots] == [False, True, True, True, True]
    assert time.monotonic() - begin < 5


def test_a_full_queue_blocks_for_block_s_of_a_step_altogether_then_drops() -> None:
    stager = Stager(HostPool(1024, "block"), 0.3)
    begin = time.monotonic()
    slots = fill(stager, 6)
    assert [slot.dropped for slot in slots] == [False] + [True] * 5
    assert 0.3 <= time.monotonic() - begin < 3
    stager.begin_step()
    assert stager.waited == 0.0


def test_a_blocked_copy_goes_on_when_memory_comes_back() -> None:
    pool = HostPool(1024, "block")
    stager = Stager(pool, 30.0)
    first = slot_for(torch.ones(1024, dtype=torch.uint8))
    stager.stage(torch.ones(1024, dtype=torch.uint8), first)
    chunks = stager.take(everything=True)
    timer = threading.Timer(0.2, pool.release, chunks)
    timer.start()
    second = slot_for(torch.ones(1024, dtype=torch.uint8))
    stager.stage(torch.ones(1024, dtype=torch.uint8), second)
    timer.join()
    assert not second.dropped and stager.waited >= 0.1


def test_a_tensor_larger_than_the_queue_passes_when_the_queue_is_empty() -> None:
    pool = HostPool(1024, "block")
    stager = Stager(pool, 0.0)
    big = torch.arange(10_000)
    slot = slot_for(big)
    stager.stage(big, slot)
    assert not slot.dropped and bytes(slot.data()) == big.numpy().tobytes()
    for chunk in stager.take(everything=True):
        pool.release(chunk)
    assert pool.in_flight == 0
