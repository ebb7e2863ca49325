"""Staged copies: exact bytes whatever the strides, bounded memory, waiting and dropping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from tests.waiting import join
from tlcore.engine.filters.tensors import TensorFilter, TensorSpec, TensorSpecs
from tlcore.engine.staging.host_memory import CHUNK_BYTES, Chunk, HostPool
from tlcore.engine.staging.stager import Stager
from tlcore.record import tensor_from_bytes

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


def form_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpecs(TensorFilter(frozenset(), None, None)).find(tensor)


def stage(stager: Stager, tensor: torch.Tensor) -> memoryview | None:
    """The staged bytes; None when the tensor was dropped."""
    spec = form_of(tensor)
    place = stager.stage(tensor, spec)
    if place is None:
        return None
    chunk, offset = place
    return chunk.view[offset : offset + spec.nbytes]


def staged(stager: Stager, tensor: torch.Tensor) -> memoryview:
    data = stage(stager, tensor)
    assert data is not None
    return data


def take(stager: Stager) -> list[Chunk]:
    return list(stager.take(everything=True))


@pytest.mark.parametrize("kind", TENSORS)
def test_a_staged_copy_has_the_tensors_bytes(kind: str) -> None:
    tensor = TENSORS[kind]()
    data = staged(Stager(HostPool(1 << 20, "block"), 1.0), tensor)
    expected = tensor.detach().resolve_conj().resolve_neg().contiguous()
    copy = tensor_from_bytes(data, tensor.dtype, tensor.shape)
    assert copy.dtype == expected.dtype and copy.shape == expected.shape
    as_bytes = expected.flatten().view(torch.uint8).tolist() if expected.numel() else []
    assert list(data) == as_bytes


def test_a_later_write_to_the_tensor_does_not_reach_the_copy() -> None:
    tensor = torch.ones(100)
    data = staged(Stager(HostPool(1 << 20, "block"), 1.0), tensor)
    tensor.zero_()
    assert tensor_from_bytes(data, tensor.dtype, tensor.shape).sum() == 100


def test_staging_in_inference_mode_and_out_of_it_share_a_pool() -> None:
    pool = HostPool(1 << 20, "block")
    stager = Stager(pool, 1.0)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            tensor = torch.arange(6.0).view(2, 3).t()
            data = staged(stager, tensor)
        assert bytes(data) == tensor.contiguous().numpy().tobytes()
        for chunk in take(stager):
            pool.release(chunk)


def test_memory_is_recycled_not_grown() -> None:
    pool = HostPool(4096, "block")
    stager = Stager(pool, 0.0)
    addresses = set()
    for _ in range(50):
        staged(stager, torch.ones(512))
        addresses.add(stager.chunk.address)
        for chunk in take(stager):
            pool.release(chunk)
    assert len(addresses) == 1


def fill(stager: Stager, pieces: int) -> list[bool]:
    """Whether each of ``pieces`` tensors of 1 KiB was dropped."""
    dropped = []
    for _ in range(pieces):
        dropped.append(stage(stager, torch.ones(1024, dtype=torch.uint8)) is None)
        take(stager)
    return dropped


def test_a_full_queue_drops_at_once_when_told_to() -> None:
    stager = Stager(HostPool(1024, "drop"), 60.0)
    begin = time.monotonic()
    assert fill(stager, 5) == [False, True, True, True, True]
    assert time.monotonic() - begin < 5


def test_a_full_queue_blocks_for_block_s_of_a_step_altogether_then_drops() -> None:
    class Pool(HostPool):
        """One that keeps how long each call may wait."""

        def acquire(self, nbytes: int, wait_s: float) -> tuple[Chunk | None, float]:
            allowed.append(wait_s)
            return super().acquire(nbytes, wait_s)

    allowed: list[float] = []
    stager = Stager(Pool(1024, "block"), 0.3)
    assert fill(stager, 6) == [False] + [True] * 5
    assert allowed[0] == 0.3 and 0 < allowed[1] <= 0.3 and allowed[2:] == [0.0] * 4
    assert stager.waited >= 0.3
    stager.begin_step()
    assert stager.waited == 0.0


def test_a_blocked_copy_goes_on_when_memory_comes_back() -> None:
    pool = HostPool(1024, "block")
    stager = Stager(pool, 30.0)
    staged(stager, torch.ones(1024, dtype=torch.uint8))
    timer = threading.Timer(0.2, pool.release, take(stager))
    timer.start()
    staged(stager, torch.ones(1024, dtype=torch.uint8))
    join(timer)
    assert stager.waited >= 0.1


def test_a_tensor_larger_than_the_queue_passes_when_the_queue_is_empty() -> None:
    pool = HostPool(1024, "block")
    stager = Stager(pool, 0.0)
    big = torch.arange(10_000)
    assert bytes(staged(stager, big)) == big.numpy().tobytes()
    for chunk in take(stager):
        pool.release(chunk)
    assert pool.in_flight == 0


def test_memory_that_the_system_refuses_is_not_counted() -> None:
    pool = HostPool(1024, "block")
    stager = Stager(pool, 0.0)
    with pytest.raises((OSError, MemoryError)):
        stage(stager, torch.zeros(1, dtype=torch.uint8).expand(1 << 46))
    assert pool.allocated == 0


def test_full_chunks_stay_until_the_pool_runs_out() -> None:
    stager = Stager(HostPool(4096, "block"), 0.0)
    stager._pool.chunk_bytes = 1024
    asked = []
    for _ in range(4):
        staged(stager, torch.ones(1024, dtype=torch.uint8))
        asked.append(stager.must_hand_over)
    assert asked == [False, False, False, True]


def small_step(stager: Stager, nbytes: int = 256) -> tuple[int, list[Chunk]]:
    """Where a step with one small tensor begins in its chunk, and the chunks handed out with it."""
    stager.begin_step()
    place = stager.stage(tensor := torch.ones(nbytes, dtype=torch.uint8), form_of(tensor))
    assert place is not None
    return place[1], take(stager)


def test_small_steps_share_a_chunk_until_one_more_would_not_fit() -> None:
    pool = HostPool(4096, "block")
    pool.chunk_bytes = 1024
    stager = Stager(pool, 0.0)
    steps = [small_step(stager) for _ in range(5)]
    assert [begin for begin, _ in steps] == [0, 256, 512, 768, 0]
    chunks = [chunks for _, chunks in steps]
    assert chunks[0] == chunks[1] == chunks[2] == chunks[3] != chunks[4]
    assert pool.in_flight == pool.allocated == 2048


def test_however_small_steps_are_not_all_wait_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcore.engine.staging.stager.MOST_SHARING", 5)
    pool = HostPool(4 * CHUNK_BYTES, "drop")
    stager = Stager(pool, 1.0)
    waiting: list[list[Chunk]] = []
    for step in range(40):
        stager.begin_step()
        if stage(stager, torch.full((2,), float(step))) is None:
            break
        waiting.append(take(stager))
    assert len(waiting) == 4 * 5 and pool.in_flight == 4 * CHUNK_BYTES
    for chunks in waiting:
        for chunk in chunks:
            pool.release(chunk)
    stager.begin_step()
    assert stage(stager, torch.ones(2)) is not None and pool.allocated <= 4 * CHUNK_BYTES


def test_a_shared_chunk_comes_back_when_no_batch_needs_it() -> None:
    pool = HostPool(2048, "drop")
    pool.chunk_bytes = 1024
    stager = Stager(pool, 0.0)
    chunks = [chunk for _ in range(4) for chunk in small_step(stager)[1]]
    assert [small_step(stager)[0] for _ in range(4)] == [0, 256, 512, 768]
    for chunk in chunks[:3]:
        pool.release(chunk)
    stager.begin_step()
    assert stage(stager, torch.ones(256, dtype=torch.uint8)) is None
    pool.release(chunks[3])
    assert small_step(stager) == (0, chunks[:1])


def test_a_step_begins_at_the_front_again_when_all_before_it_is_stored() -> None:
    pool = HostPool(4096, "block")
    pool.chunk_bytes = 1024
    stager = Stager(pool, 0.0)
    for _ in range(3):
        begin, chunks = small_step(stager)
        assert begin == 0
        pool.release(chunks[0])
    assert pool.allocated == 1024 and pool.in_flight == 0
    stager.leave()
    assert pool.acquire(1024, 0.0)[0] is chunks[0]


def test_a_queue_of_one_chunk_is_not_shared() -> None:
    """Half a step in a chunk that another still needs could wait for itself."""
    stager = Stager(HostPool(1024, "drop"), 0.0)
    first, _ = small_step(stager)
    stager.begin_step()
    assert first == 0 and stage(stager, torch.ones(256, dtype=torch.uint8)) is None
