"""Layout version 2: what the sink of segments writes, its source gives back."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from referencing import Registry, Resource
from safetensors import safe_open

import tlcore_schemas
from tests.waiting import wait_until
from tlcore.errors import BackendError
from tlcore.protocols import Buffer
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors import segments
from tlcore_backends.safetensors.columns import Column
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.storage.local import LocalStore

from .emitting import CLOSED, RUNNING, Emitter, names, opened, run_info


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


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier"])
def test_a_number_and_a_vector_of_one_are_two_arrays(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier writers did not see: what they wrote is read as it was meant."""
    if earlier:
        form = property(lambda column: (column.slot.dtype, column.slot.row, column.hashes))
        monkeypatch.setattr(Column, "content", form)
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100)
    for step in range(3):
        number = torch.tensor(step + 0.5)
        emitter.step(
            step, {"a/outputs_cpu": number, "b/outputs_cpu": number.reshape(1), "c/outputs_cpu": number}
        )
    sink.close()
    (index,) = (tmp_path / "run/segments").glob("*_steps_*.json")
    arrays = json.loads(index.read_text())["arrays"]
    assert [each.get("same_as") for each in arrays] == [None, 0 if earlier else None, 0]
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


@pytest.mark.parametrize(("limit", "most"), [("MOST_STEPS", 4), ("MOST_ITEMS", 4 * 4 * 4)])
def test_a_segment_closes_before_readers_would_refuse_it(
    monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    """At so many steps, or items in plans: of each step here four, since its tensor has a name of its own."""
    monkeypatch.setattr(segments, limit, most)
    store = MemoryStore()
    sink, emitter = opened(store, commit_s=100)
    for step in range(8):
        emitter.step(step, {f"a/outputs_{step}_cpu": torch.randn(2, 3)})
    sink.close()
    emitter.check(SegmentSource(store, CLOSED))
    indexes = [name for name in names(store) if "_steps_" in name]
    assert [name.rpartition("_steps_")[2] for name in indexes] == ["0-3.json", "4-7.json"]


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
    wait_until(lambda: told == [(0, None)], "the first step is stored")
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
    """A store that waits for ``together`` puts at a time, fails where told to, and remembers their order."""

    def __init__(self, together: int = 1, failing: str = "") -> None:
        super().__init__()
        self.together = together
        self.enough = threading.Event()
        self.failing = failing
        self.order: list[str] = []
        self.most = 0
        self._now = 0
        self._count = threading.Lock()

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        with self._count:
            self._now += 1
            self.most = max(self.most, self._now)
            if self.most >= self.together:
                self.enough.set()
        self.enough.wait(30)
        with self._count:
            self._now -= 1
        if self.failing and self.failing in name:
            raise BackendError(f"{name} fails on purpose")
        size = super().put(name, parts)
        self.order.append(name)
        return size


def test_uploads_overlap_and_indexes_come_in_order() -> None:
    store = Watched(together=4)
    sink, emitter = opened(store, commit_s=100, segment_bytes=1000)
    for step in range(20):
        emitter.step(step, {"a/outputs_cpu": torch.randn(10, 26)})
    sink.close()
    assert store.most > 3
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


class Counting(MemoryStore):
    """Notes in how many parts each blob came."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, int] = {}

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        self.parts[name] = len(parts)
        return super().put(name, parts)


@pytest.mark.parametrize(("rows", "in_parts"), [(160, True), (20, False)])
def test_large_tensors_are_sent_from_where_they_lie(rows: int, in_parts: bool) -> None:
    store = Counting()
    sink, emitter = opened(store, commit_s=100, segment_bytes=6 << 20)
    for step in range(11):
        emitter.step(
            step,
            {
                "a/inputs_0_cpu": torch.randn(rows, 512),
                "a/outputs_cpu": torch.randn(rows + step % 2, 512),
                "b/outputs_cpu": torch.randn(3, 5),
                "c/outputs_cpu": torch.ones(rows, 512),
            },
        )
    sink.close()
    most = max(count for name, count in store.parts.items() if name.endswith(".safetensors"))
    assert (most > 8) == in_parts
    emitter.check(SegmentSource(store, CLOSED))
