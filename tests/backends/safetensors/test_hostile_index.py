"""An index from anybody: whatever is changed in it, reading raises nothing but ReadError."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deep import scaled
from tests.rewriting import without_checksum
from tlcore.errors import ReadError
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors.segment_names import parse_index_name, parse_steps, steps_text
from tlcore_backends.safetensors.segment_sink import SegmentSink
from tlcore_backends.safetensors.segment_source import SegmentSource

from .emitting import Emitter, run_info

INDEX = "segments/rank_0_000000_steps_0-5.json"
CATALOGUE = "segments/catalogue_rank_0.json"
STRANGE: list[Any] = [
    *(-1, 0, 1, 1 << 40, 1 << 70, -(1 << 70), 1.5, 1e300, True, None, "", "x", "../../etc/passwd"),
    *([], {}, [0, 1 << 40], [[[]]], {"layout": 2}, [1, 2, 3]),
]


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    store = MemoryStore()
    sink = SegmentSink(commit_s=100)
    sink.open(run_info(store))
    emitter = Emitter(sink)
    for step in range(6):
        hidden = torch.randn(3 + step % 2, 4)
        rows = [{"request_id": "r", "first_row": 0, "rows": 3, "first_position": step}]
        tensors = {"a/outputs_cpu": hidden, "b/inputs_0_cpu": hidden, "b/outputs_cpu": torch.tensor(1.0)}
        emitter.step(step, tensors, rows)
    sink.close()
    # Without checksums, so that what is changed is looked at.
    return {
        name: without_checksum(data) if name.endswith(".json") else data for name, data in store.blobs.items()
    }


def read_all(blobs: dict[str, bytes], state: str) -> int:
    """Read everything that a reader would; returns how much of it was refused."""
    store = MemoryStore()
    store.blobs.update(blobs)
    refused = 0
    source = SegmentSource(store, {"state": state, "world_size": 1})
    try:
        steps = list(source.steps)
        source.ledger(0)
    except ReadError:
        return 1
    for step in steps:
        try:
            document = source.document(step, 0)
            list(source.problems(step, 0, document))
        except ReadError:
            refused += 1
            continue
        for record in document["records"]:
            source.holds(record)
            source.identity(record)
            try:
                source.read(record)
            except ReadError:
                refused += 1
        source.read_many(document["records"])
    try:
        for array in source.arrays(0):
            source.read_array(array)
    except ReadError:
        refused += 1
    return refused


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        found += places(child, (*path, key))
    return found


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    copied = copy.deepcopy(document)
    node = copied
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copied


@pytest.mark.parametrize("file", [INDEX, CATALOGUE])
def test_no_change_of_a_value_breaks_the_reader(blobs: dict[str, bytes], file: str) -> None:
    document = json.loads(blobs[file])
    assert read_all(blobs, "complete") == 0
    everywhere = places(document)
    chance = random.Random(4)
    refused = 0
    for _ in range(scaled(400, 10_000)):
        path, value = chance.choice(everywhere), chance.choice(STRANGE)
        text = json.dumps(changed(document, path, value)).encode()
        refused += read_all({**blobs, file: text}, "complete") > 0
    assert refused > 100


def test_cut_off_and_flipped_bytes_are_refused_or_found(blobs: dict[str, bytes]) -> None:
    chance = random.Random(5)
    for name in blobs:
        for _ in range(scaled(15, 500)):
            data = bytearray(blobs[name])
            if chance.random() < 0.3:
                del data[chance.randrange(len(data)) :]
            else:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            read_all({**blobs, name: bytes(data)}, "running")


def test_runs_of_numbers_that_no_memory_holds_are_refused(blobs: dict[str, bytes]) -> None:
    document = json.loads(blobs[INDEX])
    for key in ("calls", "structures", "arrays", "extents"):
        text = json.dumps(changed(document, ("plans", 0, key), [0, 1 << 39])).encode()
        assert read_all({**blobs, INDEX: text}, "complete") > 0


@pytest.mark.parametrize(
    "steps",
    [
        [0],
        [0, 1, 2],
        [3, 7],
        [0, 10, 20, 30],
        [0, 1, 2, 10, 20, 30, 31],
        [5, 6, 9, 12, 15, 100],
        list(range(0, 99, 7)),
    ],
)
def test_the_steps_in_a_name_come_back(steps: list[int]) -> None:
    assert list(parse_steps(steps_text(steps))) == steps
    name = f"segments/rank_2_000123_steps_{steps_text(steps)}.json"
    found = parse_index_name(name)
    assert found is not None and (found.rank, found.number, list(found.steps)) == (2, 123, steps)


def test_random_steps_come_back() -> None:
    chance = random.Random(6)
    for _ in range(300):
        steps = sorted(chance.sample(range(200), chance.randint(1, 60)))
        assert list(parse_steps(steps_text(steps))) == steps


@pytest.mark.parametrize(
    "text", ["5-3", "0-99999999999999999999", "0-5by2", "3,3", "3,2", "0-9,9", "0-1000000000", "0-8by0", ""]
)
def test_names_that_say_nonsense_are_no_indexes(text: str) -> None:
    assert parse_index_name(f"segments/rank_0_000000_steps_{text}.json") is None


def test_a_file_that_is_no_segment_is_left_alone(tmp_path: Path, blobs: dict[str, bytes]) -> None:
    others = {"segments/notes.txt": b"x", "segments/rank_0_000009.safetensors": b"left", "segments/a/b": b""}
    assert read_all({**blobs, **others}, "running") == 0
