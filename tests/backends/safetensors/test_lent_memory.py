"""Records whose memory the segments' sink keeps until it has sent them, and gives back then and only then."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.protocols import Buffer
from tlcore.record import Record
from tlcore.testing import FailingStore, MemoryStore
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource

from .emitting import CLOSED, Emitter, run_info
from .test_large_steps import large


class _Lease:
    """Memory of records that others write into as soon as it is given back."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.ends: list[bool] = []

    def end(self, clean: bool = True) -> None:
        self.ends.append(clean)
        if clean:
            for record in self._records:
                record.data[:] = b"\xff" * record.nbytes


class _Lender(Emitter):
    """Lends some batches of a step, and ends the leases that the sink does not want."""

    def __init__(self, sink: SegmentSink) -> None:
        super().__init__(sink)
        self._own = sink
        self.kept: list[_Lease] = []

    def write(self, number: int, tensors: dict[str, torch.Tensor], lent: Sequence[bool]) -> list[Record]:
        """A step in as many batches, without its end."""
        records = self.records(number, tensors)
        size = -(-len(records) // len(lent))
        for place, lends in enumerate(lent):
            batch = records[place * size : (place + 1) * size]
            lease = _Lease(batch)
            if not lends:
                self._own.write(batch)
                lease.end()
            elif self._own.write_lent(batch, lease):
                self.kept.append(lease)
            else:
                lease.end()
        return records


def opened(store: Any, segment_bytes: int = 1 << 20) -> tuple[SegmentSink, _Lender]:
    sink = SegmentSink(segment_bytes=segment_bytes, commit_s=1000)
    sink.open(run_info(store))
    assert sink.keeps_memory
    return sink, _Lender(sink)


LENT = [[True], [False], [True, True, True], [True, False, True], [False, True], [True, True]]


@pytest.mark.parametrize("segment_bytes", [2_000, 150_000, 1 << 20])
def test_what_is_lent_is_stored_like_what_is_copied(segment_bytes: int) -> None:
    store = MemoryStore()
    sink, lender = opened(store, segment_bytes)
    for step in range(12):
        records = lender.write(step, large(step % 5), LENT[step % len(LENT)])
        lender.commit(step, records)
    sink.close()
    assert len(lender.kept) > 8
    assert [lease.ends for lease in lender.kept] == [[True]] * len(lender.kept)
    lender.check(SegmentSource(store, CLOSED))


class _Gate(MemoryStore):
    """Takes nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open = threading.Event(), threading.Event()

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        self.asked.set()
        assert self.open.wait(60)
        return super().put(name, parts)


def test_memory_is_kept_until_it_was_sent() -> None:
    store = _Gate()
    sink, lender = opened(store, segment_bytes=50_000)
    for step in range(3):
        lender.commit(step, lender.write(step, large(step), [True]))
    assert store.asked.wait(60)
    assert [lease.ends for lease in lender.kept] == [[]] * 3
    store.open.set()
    sink.close()
    assert [lease.ends for lease in lender.kept] == [[True]] * 3
    lender.check(SegmentSource(store, CLOSED))


def test_a_step_that_fails_gives_its_memory_back() -> None:
    store = MemoryStore()
    sink, lender = opened(store)
    lender.commit(0, lender.write(0, large(0), [True]))
    lender.write(1, large(1), [True])
    lender.commit(2, lender.write(2, large(2), [True]))
    assert [lease.ends for lease in lender.kept] == [[], [True], []]
    sink.close()
    assert [lease.ends for lease in lender.kept] == [[True]] * 3
    lender.check(SegmentSource(store, CLOSED))


def test_a_store_that_fails_gives_memory_back() -> None:
    sink, lender = opened(FailingStore(MemoryStore(), ("put",)))
    told: list[BaseException | None] = []
    sink.tell_stored(lambda step, error: told.append(error))
    lender.commit(0, lender.write(0, large(0), [True]))
    sink.flush()
    assert len(told) == 1 and told[0] is not None
    assert [lease.ends for lease in lender.kept] == [[True]]


class _ReadsOn(MemoryStore):
    """Gives up while its client still reads."""

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        self.reading = [memoryview(part) for part in parts]
        raise TimeoutError("no answer")


def test_memory_that_a_client_still_reads_is_not_used_again() -> None:
    sink, lender = opened(_ReadsOn())
    tensors = {"a/outputs_cpu": torch.randn(300, 300)}
    lender.commit(0, lender.write(0, tensors, [True]))
    sink.flush()
    assert [lease.ends for lease in lender.kept] == [[False]]


def test_a_capture_of_large_tensors_that_is_faster_than_its_store(tmp_path: Any) -> None:
    """All memory is used several times; hashes are of what was captured."""
    model = nn.Sequential(nn.Identity(), nn.Tanh())
    place = {"name": "fsspec", "url": f"memory://lent/{tmp_path.name}", "format": "safetensors"}
    keys: dict[str, Any] = {"queue_bytes": 160 << 20, "block_s": 60, "log_step_ids": [], "backend": place}
    with tlcore.capture(model, module_call_match="^[01]$", **keys) as captured:
        for step in range(12):
            model(torch.full((1 << 21,), 0.01 * step))
    ledger = captured.ledger
    assert ledger.stored == ledger.captured == 12 * 4
    run = tlcore.open_run(captured.url)
    assert run.verify() == ledger.stored
    for step in range(12):
        expected = torch.full((1 << 21,), 0.01 * step)
        assert torch.equal(run.tensor(f"step_{step}/0/outputs_cpu"), expected)
        assert torch.equal(run.tensor(f"step_{step}/1/outputs_cpu"), expected.tanh())


def test_leases_of_chunks() -> None:
    from tlcore.engine.staging.host_memory import HostPool

    pool = HostPool(1 << 20, "drop")
    pool.chunk_bytes = 1000
    chunk, _ = pool.acquire(600, 0)
    assert chunk is not None
    assert pool.lend([chunk], 400) is None, "more than twice of what is wanted"
    pool.submitted(chunk)
    clean, spoilt = pool.lend([chunk], 600), pool.lend([chunk], 600)
    pool.leave(chunk)
    pool.release(chunk)
    assert clean is not None and spoilt is not None and pool.in_flight == 1000
    clean.end()
    clean.end()
    other, _ = pool.acquire(600, 0)
    assert other is not chunk
    spoilt.end(clean=False)
    assert pool.in_flight == 0 and pool.allocated == 1000
    third, _ = pool.acquire(600, 0)
    assert third is not chunk, "somebody may still read it"
