"""Reading segments: few requests, whole arrays, what is damaged; and by a stranger."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tlcore.errors import MissingError, ReadError
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors.index import SegmentIndex
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.storage.local import LocalStore

from . import stranger
from .emitting import CLOSED, RUNNING, Emitter, opened, run_info


def test_ranks_write_side_by_side(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    emitters = []
    for rank in (0, 1):
        sink, emitter = opened(store, rank, commit_s=100)
        for step in range(3 + rank):
            emitter.step(step, {"a/outputs_cpu": torch.randn(4, 4)})
        sink.close()
        emitters.append(emitter)
    source = SegmentSource(store, {"state": "complete", "world_size": 2})
    for emitter in emitters:
        emitter.check(source)
    assert {step: set(ranks.committed) for step, ranks in source.steps.items()} == {
        **{step: {0, 1} for step in range(3)},
        3: {1},
    }
    assert len(source.steps) == 4


def test_opening_and_one_step_take_few_requests_however_long_the_run() -> None:
    counts = []
    for steps in (10, 500):
        store = Counted()
        sink, emitter = opened(store, commit_s=100, segment_bytes=3000)
        for step in range(steps):
            emitter.step(step, {"a/outputs_cpu": torch.randn(10, 8)})
        sink.close()
        store.requests = 0
        source = SegmentSource(store, CLOSED)
        document = source.document(steps // 2, 0)
        assert bytes(source.read(document["records"][0])) == emitter.data[document["records"][0]["name"]]
        counts.append(store.requests)
    assert counts == [3, 3]


class Counted(MemoryStore):
    requests = 0
    moved = 0

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.requests += 1
        found = super().get(name, start, end)
        self.moved += len(found)
        return found

    def list(self, prefix: str = "") -> Iterator[Any]:
        self.requests += 1
        return super().list(prefix)


def test_one_tensor_over_all_steps_takes_a_request_or_two_for_each_segment() -> None:
    store = Counted()
    sink, emitter = opened(store, commit_s=100)
    for step in range(100):
        emitter.step(step, {"a/outputs_cpu": torch.randn(100, 100), "b/outputs_cpu": torch.randn(100, 100)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    store.requests = 0
    for step in range(100):
        record = source.document(step, 0)["records"][0]
        assert bytes(source.read(record)) == emitter.data[record["name"]]
    assert store.requests <= 2 + 2
    store.requests = 0
    (array,) = source.arrays(0, {"b/outputs_cpu"})
    assert array.shape == (10_000, 100) and len(array.rows) == 100
    data = bytes(source.read_array(array))
    assert data == b"".join(emitter.data[f"step_{step}/b/outputs_cpu"] for step in range(100))
    assert store.requests == 1


@pytest.mark.parametrize("local", [True, False])
def test_rows_of_an_array_are_read_into_memory_that_is_there(local: bool, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run") if local else MemoryStore()
    sink, emitter = opened(store, commit_s=100)
    always = torch.randn(4, 3)
    for step in range(5):
        emitter.step(step, {"a/outputs_cpu": torch.randn(6, 3), "b/outputs_cpu": always})
    sink.close()
    source = SegmentSource(store, CLOSED)
    for array in source.arrays(0):
        whole = bytes(source.read_array(array))
        for begin, size in ((0, len(whole)), (2, 60), (7, 12), (array.shape[0] - 1, 12)):
            memory = bytearray(size)
            assert source.read_array_into(array, begin, memoryview(memory)) == size
            assert memory == whole[begin * 12 :][:size]
        # What lies behind an array is another's.
        memory = bytearray(36)
        assert source.read_array_into(array, array.shape[0] - 2, memoryview(memory)) == 24
        assert memory == whole[-24:] + bytes(12)
    if local:
        for file in (tmp_path / "run" / "segments").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(ReadError, match="ends too early, "):
            source.read_array_into(next(source.arrays(0)), 0, memoryview(bytearray(36)))


def test_large_slices_that_touch_are_read_once_each() -> None:
    store = Counted()
    sink, emitter = opened(store, commit_s=100)
    emitter.step(0, {"a/outputs_cpu": torch.randn(20 << 10, 256)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    (array,) = source.arrays(0)
    store.moved = 0
    rows = range(0, 20 << 10, 5 << 10)
    found = b"".join(bytes(source.read_array(array, row, row + rows.step)) for row in rows)
    assert found == emitter.data["step_0/a/outputs_cpu"]
    assert store.moved == len(found)


def test_many_records_of_a_remote_segment_are_one_request() -> None:
    store = Counted()
    sink, emitter = opened(store, commit_s=100)
    for step in range(30):
        emitter.step(step, {f"m{n}/outputs_cpu": torch.randn(5, 5) for n in range(4)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    records = [record for step in range(30) for record in source.document(step, 0)["records"]]
    store.requests = 0
    found = source.read_many(records)
    assert [bytes(each) for each in found if not isinstance(each, Exception)] == [
        emitter.data[record["name"]] for record in records
    ]
    assert store.requests == 1


def test_the_ledger_so_far_and_at_the_end_needs_no_step() -> None:
    store = Counted()
    sink = SegmentSink(commit_s=100, segment_bytes=1000)
    run = run_info(store)
    # As the pipeline does.
    waiting: dict[int, Any] = {}
    sink.tell_stored(lambda step, error: run.ledger.add(waiting.pop(step)))
    sink.open(run)
    emitter = Emitter(sink)
    commit = sink.commit_step

    def committed(summary: Any) -> None:
        waiting[summary.step] = summary.counts
        commit(summary)

    sink.commit_step = committed  # type: ignore[method-assign, assignment]
    for step in range(7):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 8)})
    sink.flush()
    running = SegmentSource(store, RUNNING).ledger(0)
    assert running is not None
    assert (running["captured"], running["stored"], running["skipped"]) == (14, 7, 7)
    sink.close()
    source = SegmentSource(store, CLOSED)
    store.requests = 0
    assert source.ledger(0) == running
    assert store.requests == 1


def test_a_step_that_is_not_there_and_a_segment_that_was_cut_off(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    emitter.step(3, {"a/outputs_cpu": torch.randn(4, 4)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    assert 2 not in source.steps and 3 in source.steps
    with pytest.raises(MissingError):
        source.document(2, 0)
    document = source.document(3, 0)
    assert not list(source.problems(3, 0, document))
    path = tmp_path / "run/segments/rank_0_000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReadError, match="ends too early"):
        SegmentSource(store, RUNNING).read(document["records"][0])
    assert list(SegmentSource(store, RUNNING).problems(3, 0, document))


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(5):
        emitter.step(step, {"a/outputs_cpu": torch.randn(4, 4), "b/outputs_cpu": torch.ones(2)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    for step in range(5):
        for record in source.document(step, 0)["records"]:
            assert record["hash"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(source.read(record))}"


def test_a_stranger_reads_it_in_sixty_lines(tmp_path: Path) -> None:
    source = Path(stranger.__file__).read_text()
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 60 and "tlcore" not in source and "torch" not in source
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    fixed = torch.randn(6, 2)
    for step in range(10):
        hidden = torch.randn(3 if step % 4 == 0 else 8, 16)
        rows = [{"request_id": f"r{n}", "rows": 1, "first_position": 5 * step + n} for n in range(step % 3)]
        emitter.step(
            step,
            {
                "a/inputs_0_cpu": hidden,
                "a/outputs_cpu": hidden.to(torch.float16) if step % 5 == 4 else hidden + 1,
                "b/inputs_0_cpu": hidden,
                "b/inputs_1_cpu": fixed,
                "c/outputs_cpu": hidden.sum(),
            },
            rows=rows,
        )
    sink.close()
    read: Any = stranger.read_segment
    found = list(read(tmp_path / "run", "segments/rank_0_000000_steps_0-9.json"))
    assert [number for number, *_ in found] == list(range(10))
    for number, tensors, hashes, rows, ledger, started in found:
        document = emitter.documents[number]
        assert list(tensors) == [record["name"] for record in document["records"]]
        for record in document["records"]:
            array = tensors[record["name"]]
            assert array.tobytes() == emitter.data[record["name"]]
            assert list(array.shape) == record["shape"]
            assert f"xxh3-128:{hashes[record['name']]}" == record["hash"]
        assert (rows, ledger) == (document["rows"], document["ledger"])
        assert f"{started}+00:00" == document["started"]


def test_an_outline_is_the_document_without_what_needs_records(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(4):
        emitter.step(step, {"a/outputs_cpu": torch.randn(3 if step == 2 else 4, 4)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    alike = set()
    for step in (0, 3, 1, 2):
        outline = source.outline(step, 0)
        document = source.document(step, 0)
        assert outline.records() == document.pop("records")
        for key in ("calls", "structures", "shards"):
            document.pop(key)
        assert outline.rest() == {**document, "calls": [], "records": []}
        alike.add(outline.alike)
    assert len(alike) == 2
    with pytest.raises(MissingError):
        source.outline(4, 0)


def test_indexes_are_kept_as_far_as_they_are_small_and_freed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=300)
    for step in range(24):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 8)})
    sink.close()
    made: list[weakref.ref[SegmentIndex]] = []
    read = SegmentSource._read_index

    def noted(self: SegmentSource, name: Any) -> SegmentIndex:
        index = read(self, name)
        made.append(weakref.ref(index))
        return index

    monkeypatch.setattr(SegmentSource, "_read_index", noted)
    gc.collect()
    gc.disable()
    try:
        for most, kept in ((1 << 20, 16), (1, 2)):
            monkeypatch.setattr("tlcore_backends.safetensors.segment_source._MOST_INDEX_BYTES", most)
            made.clear()
            source = SegmentSource(store, CLOSED)
            for step in range(24):
                source.document(step, 0)
                source.outline(step, 0).records()
                for array in source.arrays(0, {"a/outputs_cpu"}) if not step else ():
                    assert len(array.rows[0:1])
            assert sum(index() is not None for index in made) == kept < 24 <= len(made)
    finally:
        gc.enable()


def test_threads_that_come_together_read_an_index_once(tmp_path: Path) -> None:
    store = Counted()
    sink, emitter = opened(store, commit_s=100)
    for step in range(8):
        emitter.step(step, {"a/outputs_cpu": torch.randn(4, 4)})
    sink.close()
    source = SegmentSource(store, CLOSED)
    assert len(source.steps) == 8
    store.requests = 0
    together = threading.Barrier(8)

    def ask(step: int) -> int:
        together.wait(30)
        return int(source.outline(step, 0).rest()["step"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == list(range(8))
    assert store.requests == 1
