"""Verifying segments by whole arrays: as step by step, whatever is wrong, with few documents made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.backends.safetensors.emitting import opened
from tests.deep import scaled
from tlcore.errors import ReadError, VerifyError
from tlcore.reader.run import Run
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
    """Verifies as a source without whole checks has it done."""

    def verify(store: Store) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(SegmentSource, "whole_checks", lambda self, rank: iter(()))
            return found(store)

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
    document = SegmentIndex.document

    def counted(index: SegmentIndex, number: int) -> Any:
        made.append(number)
        return document(index, number)

    monkeypatch.setattr(SegmentIndex, "document", counted)
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
    document = SegmentIndex.document

    def counted(index: SegmentIndex, number: int) -> Any:
        made.append(number)
        return document(index, number)

    monkeypatch.setattr(SegmentIndex, "document", counted)
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
