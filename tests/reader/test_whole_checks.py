"""Verifying segments by whole arrays: as step by step, whatever is wrong, with few documents made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

import tlcore
from tests.backends.safetensors.emitting import opened
from tests.deep import scaled
from tests.rewriting import without_checksum
from tlcore.errors import ReadError, VerifyError
from tlcore.reader.documents import record_problem
from tlcore.reader.run import Run
from tlcore.reader.sound_records import SoundRecords
from tlcore.reader.sound_structures import SoundStructures
from tlcore.storage import Store
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors.index import SegmentIndex
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.storage.local import LocalStore

DOCUMENT = {
    "layout": 2,
    "run_id": "run",
    "world_size": 1,
    "backend": "safetensors",
    "state": "running",
    "ledger": {},
    "config": {},
}
STRANGE: list[Any] = [-1, 0, 1, 7, 1 << 40, 1 << 70, 1.5, True, None, "", "x", [], {}, [0, 3], [5, 1 << 40]]


def write(store: Store, steps: int = 12) -> None:
    """Two segments whose steps are alike: tensors of changing and constant content, aliases, rows."""
    generator = torch.Generator().manual_seed(0)
    for rank in (0, 1):
        sink, emitter = opened(store, rank, commit_s=100)
        for step in range(steps):
            hidden = torch.randn(3 + step // 4 % 2, 4, generator=generator)
            tensors = {"a/outputs_cpu": hidden, "b/inputs_0_cpu": hidden, "c/outputs_cpu": torch.ones(5)}
            if step % 3 == 1:
                tensors["d/outputs_cpu"] = torch.tensor(float(step))
                tensors["e/outputs_cpu"] = torch.zeros(0, 4)
            suffix = f"_rank_{rank}" if rank else ""
            rows = [{"request_id": "r", "first_row": 0, "rows": 3, "first_position": step}]
            emitter.step(step, {name + suffix: each for name, each in tensors.items()}, rows)
            if step == steps // 2:
                sink.flush()
        sink.close()


def found(store: Store, world_size: int = 2) -> Any:
    """What verifying a run gives."""
    told = [0]

    def tell() -> None:
        told[0] += 1

    try:
        run = Run(store, {**DOCUMENT, "world_size": world_size})
        return run.verify(tell), told
    except VerifyError as error:
        return error.bad, told
    except ReadError as error:
        return str(error)


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Verifies as a source without whole checks has it done, each record and structure by itself."""

    def verify(store: Store, world_size: int = 2) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(SegmentSource, "whole_checks", lambda self, rank: iter(()))
            patch.setattr("tlcore.reader.verify._has_sound_kinds", lambda *given: False)
            patch.setattr(SoundRecords, "problem", lambda self, record, step: record_problem(record, step))
            patch.setattr(SoundStructures, "files_of", lambda self, document, directory: None)
            return found(store, world_size)

    return verify


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    store = MemoryStore()
    write(store)
    return dict(store.blobs)


def store_of(blobs: dict[str, bytes], directory: Path | None) -> Store:
    """The blobs in memory, or in files."""
    if directory is None:
        store = MemoryStore()
        store.blobs.update(blobs)
        return store
    for name, data in blobs.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    return LocalStore(directory)


@pytest.mark.parametrize("local", [True, False])
def test_a_sound_run_is_verified_with_few_documents(
    blobs: dict[str, bytes], by_steps: Any, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(blobs, tmp_path if local else None)
    count, told = expected = by_steps(store)
    assert count == told[0] == 2 * (12 * 3 + 4 * 2)
    made: list[int] = []
    step_kinds = SegmentIndex.step_kinds

    def counted(index: SegmentIndex, number: int) -> Any:
        made.append(number)
        return step_kinds(index, number)

    monkeypatch.setattr(SegmentIndex, "step_kinds", counted)
    assert found(store) == expected
    # One for each plan, with each number of rows, whichever segment has it.
    assert sorted(made) == sorted(2 * [0, 1, 4, 5])


def test_one_document_stands_for_segments_of_one_step_and_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only where there are several steps can an array be told once for all of them."""
    store, made = MemoryStore(), list[int]()
    sink, emitter = opened(store, commit_s=100)
    for step in range(6):
        emitter.step(step, {"a/outputs_cpu": torch.full((2, 3), step), "b/outputs_cpu": torch.ones(5)})
        if step in (0, 3):
            sink.flush()
    sink.close()
    step_kinds = SegmentIndex.step_kinds

    def counted(index: SegmentIndex, number: int) -> Any:
        made.append(number)
        return step_kinds(index, number)

    monkeypatch.setattr(SegmentIndex, "step_kinds", counted)
    count, told = found(store, world_size=1)
    assert (count, told, made) == (12, [12], [0])


@pytest.mark.parametrize("local", [True, False])
def test_every_flipped_byte_of_a_tensor_is_found(
    blobs: dict[str, bytes], by_steps: Any, local: bool, tmp_path: Path
) -> None:
    chance = random.Random(1)
    for name in [each for each in blobs if each.endswith(".safetensors")]:
        begin = 8 + int.from_bytes(blobs[name][:8], "little")
        for _ in range(scaled(6, 200)):
            data = bytearray(blobs[name])
            data[chance.randrange(begin, len(data))] ^= 1 << chance.randrange(8)
            store = store_of({**blobs, name: bytes(data)}, tmp_path if local else None)
            problems, _ = result = found(store)
            assert result == by_steps(store)
            assert isinstance(problems, list) and "step.json says" in problems[0]


def test_cut_off_missing_and_changed_files_are_told_as_step_by_step(
    blobs: dict[str, bytes], by_steps: Any, tmp_path: Path
) -> None:
    chance = random.Random(2)
    for name in blobs:
        for cut in (0, 7, len(blobs[name]) // 2, len(blobs[name]) - 1, len(blobs[name]) + 1):
            for directory in (None, tmp_path):
                store = store_of({**blobs, name: (blobs[name] + b"?")[:cut]}, directory)
                assert found(store) == by_steps(store)
        store = store_of({key: data for key, data in blobs.items() if key != name}, None)
        assert found(store) == by_steps(store)
    for _ in range(scaled(10, 300)):
        name = chance.choice(list(blobs))
        data = bytearray(blobs[name])
        data[chance.randrange(len(data))] = chance.randrange(256)
        store = store_of({**blobs, name: bytes(data)}, None)
        assert found(store) == by_steps(store)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to each value of a document."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(each for key, child in items for each in places(child, (*path, key)))]


def test_a_changed_index_is_told_as_step_by_step(blobs: dict[str, bytes], by_steps: Any) -> None:
    chance = random.Random(3)
    name = next(each for each in blobs if each.endswith("_steps_7-11.json") and "rank_0" in each)
    everywhere = [path for path in places(json.loads(blobs[name])) if path]
    refused = 0
    for _ in range(scaled(150, 20_000)):
        document = json.loads(blobs[name])
        path = chance.choice(everywhere)
        node = document
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = chance.choice(STRANGE)
        store = store_of({**blobs, name: json.dumps(document).encode()}, None)
        result = found(store)
        assert result == by_steps(store), path
        refused += not isinstance(result[0], int)
    assert refused > 50


@pytest.fixture(scope="module")
def single_steps() -> dict[str, bytes]:
    """Segments of one step each, whose indexes and headers differ in little."""
    store, generator = MemoryStore(), torch.Generator().manual_seed(0)
    sink, emitter = opened(store, commit_s=100)
    for step in range(6):
        hidden = torch.randn(3, 4, generator=generator)
        emitter.step(
            step,
            {"a/outputs_cpu": hidden, "b/inputs_0_cpu": hidden, "c/outputs_cpu": torch.ones(5) * step},
            [{"request_id": f"r{step}", "first_row": 0, "rows": 3, "first_position": step}],
        )
        sink.flush()
    sink.close()
    return dict(store.blobs)


@pytest.mark.parametrize("local", [True, False])
def test_any_changed_byte_of_a_segment_like_another_is_told_as_step_by_step(
    single_steps: dict[str, bytes], by_steps: Any, local: bool, tmp_path: Path
) -> None:
    chance, refused = random.Random(5), 0
    count, _ = found(store_of(single_steps, tmp_path if local else None), 1)
    assert count == 18
    names = [name for name in single_steps if "000003" in name]
    for name in names * scaled(60, 3000):
        data = bytearray(single_steps[name])
        data[chance.randrange(len(data))] = chance.choice(b'0123456789AZ",[]{}\\ ab=')
        store = store_of({**single_steps, name: bytes(data)}, tmp_path if local else None)
        result = found(store, 1)
        assert result == by_steps(store, 1), (name, bytes(data))
        refused += not isinstance(result[0], int)
    assert refused > 60


def test_a_structure_is_known_by_all_but_its_directory() -> None:
    def structure(directory: str, dtype: Any = "torch.float32", file: str = "outputs_cpu.pt") -> Any:
        node = {"type": "tensor", "shape": [2], "dtype": dtype, "numel": 2, "device": "cpu"}
        return {"type": "tuple", "items": [{**node, "file": directory + file}, {"type": "none"}]}

    known = SoundStructures()
    assert known.files_of(structure("step_0/a/"), "step_0/a/") is None
    known.learn_document(structure("step_0/a/"), "step_0/a/")
    assert known.files_of(structure("step_0/b/"), "step_0/b/") == ["step_0/b/outputs_cpu.pt"]
    assert known.files_of(structure("step_0/b/"), "step_0/a/") is None
    others: list[Any] = ["torch.float16", 7, None, [[]], {"step_0/b/": 1}]
    for dtype in others:
        assert known.files_of(structure("step_0/b/", dtype), "step_0/b/") is None
    # What refers to another place, or says its directory elsewhere too, stands for nothing else.
    known = SoundStructures()
    known.learn_document(structure("step_0/a/"), "step_0/c/")
    known.learn_document(structure("step_0/a/", file="step_0/a/x.pt"), "step_0/a/")
    known.learn_document(structure("step_0/a/", dtype="step_0/a/"), "step_0/a/")
    assert not known._documents
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    known.learn_document({"type": "none", "more": deep}, "step_0/a/")
    assert not known._documents and known.files_of({"more": deep}, "step_0/a/") is None


def test_of_segments_that_are_all_different_few_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store, alive, most = MemoryStore(), WeakSet[SegmentIndex](), 0
    sink, emitter = opened(store, 0, commit_s=100)
    for step in range(60):
        emitter.step(step, {"a/outputs_cpu": torch.full((step + 1, 2), float(step))})
        sink.flush()
    sink.close()

    class Counted(SegmentIndex):
        def __init__(self, *given: Any) -> None:
            alive.add(self)
            super().__init__(*given)

    def look() -> None:
        nonlocal most
        most = max(most, len(alive))

    monkeypatch.setattr("tlcore_backends.safetensors.segment_source.SegmentIndex", Counted)
    assert Run(store, {**DOCUMENT}).verify(look) == 60
    assert 0 < most < 30


def test_the_hash_of_another_step_is_no_proof(single_steps: dict[str, bytes]) -> None:
    """The index of a segment like another one, with that one's hashes over its own data."""
    name = next(each for each in single_steps if each.endswith("000003_steps_3.json"))
    other = next(each for each in single_steps if each.endswith("000002_steps_2.json"))
    arrays = json.loads(single_steps[other])["arrays"]
    document = without_checksum(single_steps[name]).split(b",\n")
    place = next(at for at, part in enumerate(document) if part.startswith(b'"arrays":'))
    document[place] = b'"arrays":' + json.dumps(arrays, separators=(",", ":")).encode()
    store = store_of({**single_steps, name: b",\n".join(document)}, None)
    problems, _ = found(store, 1)
    assert len(problems) == 3 and all("step_3/" in each and "step.json says" in each for each in problems)


def test_a_real_run_is_verified_by_whole_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Structures have values that change from step to step."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: float, count: int) -> Any:
            return {"x": x * scale, "count": count, "text": "as it is"}

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = Root()
    keys: Any = {"output_dir": str(tmp_path), "log_step_ids": []}
    backend = {"name": "safetensors", "commit_s": 100}
    with tlcore.capture(model, **keys, backend=backend) as capture, torch.no_grad():
        for step in range(9):
            model(torch.randn(2, 3), scale=0.5 * step, count=step - 3)
    whole = tlcore.open_run(capture.url).verify()
    monkeypatch.setattr(SegmentSource, "whole_checks", lambda self, rank: iter(()))
    assert whole == tlcore.open_run(capture.url).verify() > 0
