"""Remote shards: put together in memory that is used again, while the one before travels."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.backends.raw import committed
from tlcore.errors import BackendError
from tlcore.protocols import Buffer
from tlcore.record import Record
from tlcore.registry import open_store
from tlcore.testing import make_record, make_run, make_summary
from tlcore_backends.safetensors.shard_buffer import ShardBuffer, ShardBuffers
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.remote import FsspecStore

FLOATS = 1 << 19


def records_of(step: int, count: int = 3) -> list[Record]:
    return [make_record(f"step_{step}/m/{i}_cpu", torch.rand(FLOATS)) for i in range(count)]


def opened(url: str) -> SafetensorsSink:
    sink = SafetensorsSink(shard_bytes=4 * FLOATS)
    sink.open(make_run(url))
    return sink


def write_step(sink: SafetensorsSink, step: int, records: list[Record]) -> None:
    sink.write(records)
    sink.commit_step(make_summary(step, records))


def test_bytes_stay_when_the_memory_grows() -> None:
    gathered = ShardBuffer()
    gathered.skip(100)
    parts = [np.random.default_rng(i).bytes(700_000 + i) for i in range(12)]
    for part in parts:
        gathered.append(memoryview(part))
    assert bytes(gathered.view()[100:]) == b"".join(parts)


def test_memory_is_used_again_unless_somebody_still_reads_it() -> None:
    memory = ShardBuffers()
    first = memory.take()
    first.append(memoryview(b"first"))
    memory.give(first)
    assert memory.take() is first
    first.append(memoryview(b"again"))
    reader = np.frombuffer(first.view(), np.uint8)
    memory.give(first)
    assert memory.take() is not first
    assert reader.tobytes() == b"again"


def test_a_shard_travels_while_the_next_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    put, may_end, begun = FsspecStore.put, threading.Event(), threading.Event()

    def hold_first(self: FsspecStore, name: str, parts: Sequence[Buffer]) -> int:
        if name.endswith("_0.safetensors"):
            begun.set()
            assert may_end.wait(30)
        return put(self, name, parts)

    monkeypatch.setattr(FsspecStore, "put", hold_first)
    url = "memory://travels/run"
    sink, records = opened(url), records_of(0, 2)
    try:
        sink.write(records)
        assert begun.wait(30)
    finally:
        may_end.set()
    sink.commit_step(make_summary(0, records))
    found = committed(open_store(url))[0]
    assert all(torch.equal(found[record.name], record.tensor()) for record in records)


@pytest.mark.parametrize("refused", ["shard_rank_0_0", "shard_rank_0_2"])
def test_a_shard_that_is_refused_fails_its_step_alone(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    put = FsspecStore.put

    def refuse(self: FsspecStore, name: str, parts: Sequence[Buffer]) -> int:
        if name == f"step_1/{refused}.safetensors":
            raise BackendError("refused on purpose")
        return put(self, name, parts)

    monkeypatch.setattr(FsspecStore, "put", refuse)
    url = f"memory://{refused}/run"
    sink, stored = opened(url), {}
    for step in range(4):
        records = records_of(step)
        if step == 1:
            with pytest.raises(BackendError, match="refused on purpose"):
                write_step(sink, step, records)
        else:
            write_step(sink, step, records)
            stored[step] = records
    sink.close()
    for step, found in committed(open_store(url)).items():
        assert all(torch.equal(found[record.name], record.tensor()) for record in stored[step])
    assert set(committed(open_store(url))) == {0, 2, 3}


@pytest.mark.parametrize("usual", [0, 32 << 20])
@pytest.mark.parametrize("large_pages", [True, False])
def test_large_memory_is_taken_up_ahead_and_holds_what_was_written(
    usual: int, large_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not large_pages:
        monkeypatch.setattr("tlcore.hotpath.new_memory.touch", lambda *given: False)
    gathered = ShardBuffer(usual)
    parts = [
        np.random.default_rng(i).bytes(size) for i, size in enumerate((3, 5 << 20, 4 << 20, 7, 30 << 20))
    ]
    for part in parts:
        gathered.append(memoryview(part))
    kept = gathered.nbytes
    gathered.extend([b"forgotten"])
    gathered.nbytes = kept
    assert bytes(gathered.view()) == b"".join(parts)
    with gathered.view() as before:
        # Somebody reads: what grows is a copy.
        gathered.extend([parts[-1], parts[-1]])
        assert before == b"".join(parts)
    assert bytes(gathered.view()) == b"".join([*parts, parts[-1], parts[-1]])
