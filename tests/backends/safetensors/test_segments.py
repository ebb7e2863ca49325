"""Layout version 2: what the sink of segments writes, its source gives back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import xxhash
from referencing import Registry, Resource
from safetensors import safe_open

import tlcore
import tlcore_schemas
from tlcore.errors import BackendError, ConfigError, MissingError, ReadError
from tlcore.protocols import Buffer
from tlcore.storage import Store
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors import versions
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.safetensors.sink import SafetensorsSink
from tlcore_backends.storage.local import LocalStore

from . import stranger
from .emitting import Emitter, run_info

CLOSED = {"state": "complete", "world_size": 1}
RUNNING = {"state": "running", "world_size": 1}


def opened(store: Store, rank: int = 0, **options: Any) -> tuple[SegmentSink, Emitter]:
    sink = SegmentSink(**options)
    sink.open(run_info(store, rank))
    return sink, Emitter(sink, rank)


def names(store: Store) -> list[str]:
    return sorted(entry.name for entry in store.list())


def test_many_steps_come_back_as_they_were(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(40):
        hidden = torch.randn(3 if step % 7 == 0 else 8, 16)
        out = torch.randn(2, 4).to(torch.bfloat16) if step % 5 else torch.randn(2, 6)
        emitter.step(
            step,
            {
                "a/inputs_0_cpu": hidden,
                "a/outputs_cpu": out,
                "b/inputs_0_cpu": out,
                "b/outputs_cpu": torch.tensor(float(step)),
                "c/inputs_0_cpu": torch.arange(5),
                "c/outputs_0_cpu": torch.zeros(0, 3),
                "d/outputs_cpu": torch.randn(2).to(torch.complex128) if step < 20 else hidden,
                "e/outputs_cpu": torch.tensor([True, False, True]),
                "f/outputs_cpu": torch.tensor(step % 2 == 0),
            },
            rows=[
                {"request_id": f"r{n}", "first_row": n, "rows": 1, "first_position": step + n}
                for n in range(3)
            ],
            extra={"padded_rows": step % 3, "sharding": {"tp_rank": 0, "weights": [1, 2.5, None, True]}},
            batches=1 + step % 3,
        )
    sink.close()
    assert names(store) == [
        "segments/catalogue_rank_0.json",
        "segments/rank_0_000000.safetensors",
        "segments/rank_0_000000_steps_0-39.json",
    ]
    for run in (CLOSED, RUNNING):
        emitter.check(SegmentSource(store, run))
    # In any order.
    source = SegmentSource(store, CLOSED)
    for step in (30, 2, 39, 0):
        document = source.document(step, 0)
        assert document["rows"] == emitter.documents[step]["rows"]
        for record in document["records"]:
            assert bytes(source.read(record)) == emitter.data[record["name"]]
    source.close()


def test_a_plain_reader_finds_one_matrix(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    hidden = [torch.randn(4, 8) for _ in range(10)]
    fixed = torch.randn(6, 2)
    for step, tensor in enumerate(hidden):
        emitter.step(
            step,
            {
                "a/outputs_cpu": tensor,
                "b/inputs_0_cpu": tensor,
                "b/inputs_1_cpu": fixed,
                "c/outputs_cpu": tensor[0, 0].clone(),
            },
        )
    sink.close()
    with safe_open(tmp_path / "run/segments/rank_0_000000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a/outputs_cpu", "b/inputs_1_cpu", "c/outputs_cpu"]
        assert torch.equal(file.get_tensor("a/outputs_cpu"), torch.cat(hidden))
        assert torch.equal(file.get_tensor("b/inputs_1_cpu"), fixed)
        assert torch.equal(file.get_tensor("c/outputs_cpu"), torch.stack([t[0, 0] for t in hidden]))
        marks = file.metadata()
    assert marks["tlcore.alias.b/inputs_0_cpu"] == "a/outputs_cpu"
    assert marks["tlcore.constant.b/inputs_1_cpu"] == "10"


def test_only_a_whole_array_is_an_alias(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(6):
        tensor = torch.randn(4, 8)
        emitter.step(step, {"a/outputs_cpu": tensor, "b/inputs_0_cpu": tensor if step else torch.randn(4, 8)})
    sink.close()
    with safe_open(tmp_path / "run/segments/rank_0_000000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a/outputs_cpu", "b/inputs_0_cpu"]
    emitter.check(SegmentSource(store, CLOSED))


def test_the_index_is_as_its_schema_says_and_small(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(400):
        tensor = torch.randn(8, 288)
        rows = [{"request_id": "r", "first_row": 0, "rows": 8, "first_position": step}]
        emitter.step(step, {"a/inputs_0_cpu": tensor, "a/outputs_cpu": tensor + 1}, rows)
    sink.close()
    (name,) = (each for each in names(store) if "_steps_" in each)
    text = store.get(name)
    # 18 KB a step; goals are 200 bytes a step, and 2 % of the payload.
    assert len(text) / 400 < 100
    schemas = [tlcore_schemas.load(each) for each in ("run.v1", "segment.v2")]
    registry: Registry[Any] = Registry().with_resources([("run.v1.json", Resource.from_contents(schemas[0]))])
    jsonschema.Draft202012Validator(schemas[1], registry=registry).validate(json.loads(text))


def test_a_segment_closes_at_its_size_and_a_larger_step_spans_files(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=10_000)
    small = {"a/outputs_cpu": torch.randn(10, 100)}
    for step in range(5):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 100)})
    shared = torch.randn(10, 100)
    large = {f"m{n}/outputs_cpu": torch.randn(10, 100) for n in range(9)}
    emitter.step(5, {"x/outputs_cpu": shared, **large, "y/inputs_0_cpu": shared}, batches=11)
    emitter.step(6, small)
    sink.close()
    indexes = [name for name in names(store) if "_steps_" in name]
    assert [name.partition("_steps_")[2] for name in indexes] == ["0-2.json", "3-4.json", "5.json", "6.json"]
    assert sum(name.startswith("segments/rank_0_000002") and name.endswith("s") for name in names(store)) == 4
    emitter.check(SegmentSource(store, CLOSED))


def test_a_step_that_is_abandoned_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=10_000)
    emitter.step(0, {"a/outputs_cpu": torch.randn(10, 10)})
    sink.write(emitter.records(1, {"a/outputs_cpu": torch.randn(10, 10)}))
    emitter.step(2, {"a/outputs_cpu": torch.randn(10, 10)})
    # One so large that it is half written already.
    for n in range(6):
        sink.write(emitter.records(3, {f"m{n}/outputs_cpu": torch.randn(10, 100)}))
    emitter.step(4, {"a/outputs_cpu": torch.randn(10, 10)})
    sink.write(emitter.records(5, {"a/outputs_cpu": torch.randn(10, 10)}))
    sink.close()
    emitter.check(SegmentSource(store, CLOSED), [0, 2, 4])
    assert sum(name.endswith(".safetensors") for name in names(store)) == sum(
        "_steps_" in n for n in names(store)
    )


def test_commit_s_closes_a_segment_in_time_also_within_a_step(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=0.2)
    told: list[tuple[int, BaseException | None]] = []
    sink.tell_stored(lambda step, error: told.append((step, error)))
    emitter.step(0, {"a/outputs_cpu": torch.randn(4, 4)})
    records = emitter.records(1, {"a/outputs_cpu": torch.randn(4, 4), "b/outputs_cpu": torch.randn(2)})
    sink.write(records[:1])
    assert not told
    until(lambda: told == [(0, None)])
    source = SegmentSource(store, RUNNING)
    emitter.check(source)
    sink.write(records[1:])
    emitter.commit(1, records)
    sink.flush()
    assert told == [(0, None), (1, None)]
    emitter.check(source, [0])
    source.refresh()
    emitter.check(source)
    sink.close()


def test_commit_s_zero_stores_each_step_before_it_returns(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=0)
    for step in range(3):
        emitter.step(step, {"a/outputs_cpu": torch.randn(4, 4)})
        emitter.check(SegmentSource(store, RUNNING))
    sink.close()


class Watched(MemoryStore):
    """A store that is slow, fails where it is told to, and remembers the order of what was put."""

    def __init__(self, delay_s: float = 0.0, failing: str = "") -> None:
        super().__init__()
        self.delay_s = delay_s
        self.failing = failing
        self.order: list[str] = []
        self.most = 0
        self._now = 0
        self._count = threading.Lock()

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        with self._count:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.delay_s)
        with self._count:
            self._now -= 1
        if self.failing and self.failing in name:
            raise BackendError(f"{name} fails on purpose")
        size = super().put(name, parts)
        self.order.append(name)
        return size


def test_uploads_overlap_and_indexes_come_in_order() -> None:
    store = Watched(delay_s=0.05)
    sink, emitter = opened(store, commit_s=100, segment_bytes=1000)
    begin = time.perf_counter()
    for step in range(20):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 26)})
    took = time.perf_counter() - begin
    sink.close()
    assert took < 1.0 and store.most > 3
    indexes = [name for name in store.order if "_steps_" in name]
    assert indexes == sorted(indexes) and len(indexes) == 20
    for name in indexes:
        assert store.order.index(name) > store.order.index(f"{name.partition('_steps_')[0]}.safetensors")
    emitter.check(SegmentSource(store, CLOSED))


@pytest.mark.parametrize("failing", ["rank_0_000001.safetensors", "rank_0_000001_steps"])
def test_a_segment_that_fails_costs_its_own_steps_only(failing: str) -> None:
    store = Watched(failing=failing)
    sink, emitter = opened(store, commit_s=100, segment_bytes=2000)
    told: dict[int, BaseException | None] = {}
    sink.tell_stored(lambda step, error: told.__setitem__(step, error))
    for step in range(6):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 26)})
    sink.close()
    assert {step for step, error in told.items() if error is not None} == {2, 3}
    assert sorted(told) == list(range(6))
    emitter.check(SegmentSource(store, CLOSED), [0, 1, 4, 5])


def test_memory_that_is_held_is_told_and_given_back(tmp_path: Path) -> None:
    held: list[int] = []
    store = LocalStore(tmp_path / "run")
    sink = SegmentSink(commit_s=100, segment_bytes=10_000)
    sink.open(run_info(store, hold=held.append, queue_bytes=1 << 20))
    emitter = Emitter(sink)
    for step in range(21):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 26)})
        assert 0 <= sum(held) < 1 << 20
    assert sum(held) > 0
    sink.close()
    assert sum(held) == 0


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

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.requests += 1
        return super().get(name, start, end)

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


def until(condition: Any, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


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


def test_options_select_their_layout_and_contradictions_are_refused() -> None:
    assert isinstance(versions.make_sink(layout=2), SegmentSink)
    assert isinstance(versions.make_sink(commit_s=0), SegmentSink)
    assert isinstance(versions.make_sink(segment_bytes=1 << 20), SegmentSink)
    assert isinstance(versions.make_sink(shard_bytes=1 << 20), SafetensorsSink)
    for options in ({"layout": 1, "commit_s": 1}, {"layout": 2, "shard_bytes": 1}):
        with pytest.raises(ConfigError, match="has no such option"):
            versions.make_sink(**options)  # type: ignore[arg-type]


def test_a_long_capture_of_single_objects_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for number, (format, steps) in enumerate([("pt", []), ("pt", [0]), ("safetensors", [])]):
        backend = {"name": "fsspec", "format": format, "url": f"memory://warned-{number}"}
        caplog.clear()
        with tlcore.capture(module, backend=backend, log_step_ids=steps):
            module(torch.ones(2, 4))
            module(torch.ones(2, 4))
        found = [text for text in caplog.messages if "one object for each tensor" in text]
        assert len(found) == (1 if (format, steps) == ("pt", []) else 0)
