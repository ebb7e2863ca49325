"""Steps too large to share a segment, which go to the local disk while they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tlcore.errors import BackendError
from tlcore_backends.safetensors import segment_sink, step_files
from tlcore_backends.safetensors.segment_check import segment_problems
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.storage.local import LocalStore

from .emitting import CLOSED, Emitter, names, opened, run_info

SEGMENT_BYTES = 64_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is large from 32 KB on, or the quarter where the one before was."""
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1000)
    monkeypatch.setattr(step_files, "RESERVE", 8 << 10)


def large(step: int) -> dict[str, torch.Tensor]:
    """Tensors of all kinds, in no order that would align them, 61 KB."""
    hidden = torch.randn(40, 60) + step
    return {
        "a/inputs_0_cpu": hidden,
        "a/outputs_cpu": torch.randn(40, 60),
        "b/inputs_0_cpu": torch.tensor([True, False, True]),
        "b/inputs_1_cpu": hidden,
        "b/outputs_cpu": torch.randn(3, 5).to(torch.bfloat16),
        "c/inputs_0_cpu": torch.tensor(step + 0.5),
        "c/inputs_1_cpu": torch.tensor([step + 0.5]),
        "c/outputs_cpu": torch.zeros(0, 7),
        "d/inputs_0_cpu": torch.tensor([step, 2], dtype=torch.int8),
        "d/outputs_cpu": torch.randn(50, 40).to(torch.complex128),
        # The same bytes as another's, and another meaning.
        "e/outputs_cpu": hidden.view(torch.int32),
    }


def problems(store: LocalStore) -> list[str]:
    source = SegmentSource(store, CLOSED)
    found: list[str] = []
    for step in source.steps:
        index = source._index(step, 0)
        found += segment_problems(store, index, {e.name: e.size for e in store.list()}, thorough=True)
        # The array of two meanings is stored twice; no element lies askew.
        for name, _ in index.files:
            head = int.from_bytes(store.get(name, 0, 8), "little")
            for key, entry in json.loads(store.get(name, 8, 8 + head)).items():
                width = {"F": 8, "I": 4}.get(entry.get("dtype", "U")[0], 1)
                width = {"BF16": 2, "I8": 1, "F32": 4}.get(entry.get("dtype", ""), width)
                if key != "__metadata__" and entry["data_offsets"][0] % width:
                    found.append(f"{key} is askew")
    return found


@pytest.mark.parametrize("batches", [1, 3, 11])
def test_large_and_small_steps_in_turn(batches: int, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=SEGMENT_BYTES)
    for step in range(9):
        tensors = large(step) if step % 4 != 1 else {"a/outputs_cpu": torch.randn(10, 10)}
        emitter.step(step, tensors, batches=batches)
    sink.close()
    for run in (CLOSED, {"state": "running", "world_size": 1}):
        emitter.check(SegmentSource(store, run))
    assert problems(store) == []
    indexes = [name.partition("_steps_")[2] for name in names(store) if "_steps_" in name]
    assert indexes == [f"{step}.json" for step in range(9)]
    with safe_open(tmp_path / "run/segments/rank_0_000002.safetensors", "pt") as file:
        assert "b/inputs_1_cpu" not in list(file.keys())
        assert bytes(file.get_tensor("e/outputs_cpu").numpy()) == emitter.data["step_2/e/outputs_cpu"]
        assert file.metadata()["tlcore.alias.b/inputs_1_cpu"] == "a/inputs_0_cpu"


def test_nothing_of_it_is_kept_in_memory_and_nothing_is_seen_before_its_end(tmp_path: Path) -> None:
    held: list[int] = []
    store = LocalStore(tmp_path / "run")
    sink = SegmentSink(SEGMENT_BYTES, commit_s=100)
    sink.open(run_info(store, hold=held.append, queue_bytes=1 << 20))
    emitter = Emitter(sink)
    tensors = {f"m{n}/outputs_cpu": torch.randn(10, 100) for n in range(40)}
    records = emitter.records(0, tensors)
    for begin in range(0, 40, 5):
        sink.write(records[begin : begin + 5])
        assert sum(held) < SEGMENT_BYTES // 2
    assert len(list((tmp_path / "run/segments").glob("*.tmp"))) == 1
    assert not [name for name in names(store) if "_steps_" in name]
    emitter.commit(0, records)
    sink.flush()
    assert sum(held) == 0
    emitter.check(SegmentSource(store, {"state": "running", "world_size": 1}))
    sink.close()
    # 160 KB in files of about a segment's size each.
    assert sum(name.endswith(".safetensors") for name in names(store)) == 3


def test_tensors_that_would_misalign_others_wait_for_the_end_of_a_file_at_most(tmp_path: Path) -> None:
    held: list[int] = []
    store = LocalStore(tmp_path / "run")
    sink = SegmentSink(SEGMENT_BYTES, commit_s=100)
    sink.open(run_info(store, hold=held.append))
    emitter = Emitter(sink)
    odd = {f"m{n}/outputs_cpu": torch.randint(0, 99, (70_001,), dtype=torch.int8) for n in range(4)}
    emitter.step(0, {"a/outputs_cpu": torch.randn(3, 5).to(torch.bfloat16), **odd}, batches=5)
    assert max(held) < 2 * SEGMENT_BYTES
    sink.close()
    emitter.check(SegmentSource(store, CLOSED))
    assert problems(store) == []


def test_a_header_without_room_begins_another_file_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_files, "RESERVE", 2 << 10)
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=1 << 20)
    shared = torch.randn(512, 300)
    named = {f"{'m' * 60}{n}/outputs_cpu": torch.randn(1, 2) + n for n in range(60)}
    emitter.step(0, {"a/outputs_cpu": shared, **named, "z/inputs_0_cpu": shared})
    sink.close()
    emitter.check(SegmentSource(store, CLOSED))
    assert problems(store) == []
    assert 2 < sum(name.endswith(".safetensors") for name in names(store)) < 8


@pytest.mark.parametrize("told", [True, False], ids=["another-step", "at-the-end"])
def test_one_that_is_abandoned_leaves_no_file(told: bool, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=SEGMENT_BYTES)
    emitter.step(0, large(0))
    sink.write(emitter.records(1, {f"m{n}/outputs_cpu": torch.randn(10, 100) for n in range(40)}))
    if told:
        emitter.step(2, large(2))
    sink.close()
    emitter.check(SegmentSource(store, CLOSED), [0, 2] if told else [0])
    assert not list((tmp_path / "run").rglob("*.tmp"))
    segments = {name.partition("_steps_")[0].partition(".")[0] for name in names(store)}
    assert len(segments) == (3 if told else 2)


def test_a_tensor_that_comes_twice_fails_its_step_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    sink, emitter = opened(store, commit_s=100, segment_bytes=SEGMENT_BYTES)
    emitter.step(0, large(0))
    records = emitter.records(1, {"a/outputs_cpu": torch.randn(40, 200)})
    sink.write(records)
    with pytest.raises(BackendError, match="a/outputs_cpu was captured twice in one step"):
        sink.write(records)
    emitter.step(2, large(2))
    sink.close()
    emitter.check(SegmentSource(store, CLOSED), [0, 2])
