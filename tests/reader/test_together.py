"""Small steps of a long run are read together: by few reads, in bounded memory, and as one by one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.reading import command
from tlcore.config.configuration import load_config
from tlcore.errors import VerifyError
from tlcore.reader import documents, stored
from tlcore.reader.stored import Stored
from tlcore.runs.convert import convert
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors.segment_files import SegmentFiles

STEPS = 40
SEGMENTS: dict[str, Any] = {"name": "safetensors", "commit_s": 100}


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    """Steps of one layer, in one segment."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    keys: dict[str, Any] = {"output_dir": str(tmp_path / "runs"), "log_step_ids": [], "backend": SEGMENTS}
    with torch.no_grad(), tlcore.capture(model, module_call_match="^0$", **keys) as capture:
        for step in range(STEPS):
            model(torch.randn(2 + step // 30, 8))
    return Path(capture.url)


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a file asked for."""
    asked: list[int] = []
    original, into = os.pread, os.preadv

    def spied(handle: int, size: int, begin: int) -> bytes:
        asked.append(size)
        return original(handle, size, begin)

    # Without the C extension some are read into memory that is there.
    def spied_into(handle: int, memory: list[memoryview], begin: int) -> int:
        asked.append(memory[0].nbytes)
        return into(handle, memory, begin)

    monkeypatch.setattr(os, "pread", spied)
    monkeypatch.setattr(os, "preadv", spied_into)
    return asked


def test_stats_and_compare_read_arrays_not_steps(
    captured: Path, preads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(self: Stored, record: Any, begin: int, end: int) -> Any:
        raise AssertionError(f"{record['name']} was read alone")

    monkeypatch.setattr(Stored, "read_range", alone)
    survey = tlcore.stats(captured)
    assert len(preads) < STEPS // 2
    tensors = {each.name: each.values for each in survey.tensors}
    assert len(tensors) == 2 * STEPS
    run = tlcore.open_run(captured)
    for name, values in tensors.items():
        assert values is not None
        assert values.mean == pytest.approx(float(run.tensor(name).double().mean()), rel=1e-9)
    del preads[:]
    assert tlcore.compare(captured, captured, deep=True).equal
    # A few for each batch of pairs, and not two for each of them.
    assert len(preads) < 2 * STEPS


@pytest.mark.parametrize("window", [1, 300, 1 << 20])
def test_converted_in_windows_of_any_size_it_is_the_same(
    captured: Path, tmp_path: Path, preads: list[int], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    # Steps that are alike would go whole, whatever the window is.
    monkeypatch.setattr("tlcore.runs.conversion.alike_steps", lambda stored, rank: iter(()))
    monkeypatch.setattr("tlcore.runs.conversion._LOCAL_BATCH_BYTES", window)
    url = convert(tlcore.open_run(captured), load_config(output_dir=str(tmp_path / "pt"), backend="pt"))
    assert (len(preads) < 10) == (window > 300)
    again = convert(tlcore.open_run(url), load_config(output_dir=str(tmp_path / "back"), backend=SEGMENTS))
    one, other = tlcore.open_run(captured), tlcore.open_run(again)
    assert other.verify() == one.verify() == 2 * STEPS
    for number in one.steps:
        assert other.step(number).names == one.step(number).names
        for name in one.step(number).names:
            assert torch.equal(one.tensor(name), other.tensor(name))
        for kind in ("inputs", "outputs"):
            assert one.json(f"step_{number}/0/{kind}.json") == other.json(f"step_{number}/0/{kind}.json")


def test_a_damaged_step_among_others_is_found_wherever_it_is_read(captured: Path, tmp_path: Path) -> None:
    record = tlcore.open_run(captured).step(17).record("step_17/0/outputs_cpu")
    file = captured / record["shard"]
    data = bytearray(file.read_bytes())
    data[record["offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerifyError, match="step_17/0/outputs_cpu"):
        convert(tlcore.open_run(captured), load_config(output_dir=str(tmp_path / "pt"), backend="pt"))
    file.write_bytes(data[: record["offsets"][0] + 3])
    survey = tlcore.stats(captured)
    bad = {each.name for each in survey.tensors if each.problem is not None}
    assert "step_17/0/outputs_cpu" in bad and "step_16/0/outputs_cpu" not in bad
    assert command("compare", str(captured), str(captured))[0] == 1


def test_documents_that_are_alike_are_checked_once(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def counted(document: Any, where: str, *more: Any) -> Any:
        checked.append(where)
        return documents.check_step(document, where, *more)

    monkeypatch.setattr(stored, "check_step", counted)
    run = tlcore.open_run(captured)
    assert [len(run.step(number).records) for number in run.steps] == [2] * STEPS
    # The first few, and one more of each number of rows.
    assert len(checked) < 8


@pytest.mark.parametrize(
    ("ranges", "gets"),
    [
        # One array's rows of consecutive steps, in any order and one of them twice.
        ([(1000, 2000), (3000, 4000), (2000, 3000), (2000, 3000)], [(1000, 4000)]),
        ([(0, 10), (700_000, 700_010)], [(0, 10), (700_000, 700_010)]),
        # So many requests take longer than all of it.
        ([(at, at + 10) for at in range(0, 900_000, 100_000)], [(0, 1 << 20)]),
    ],
)
def test_of_a_remote_file_no_more_is_read_than_takes_as_long(
    ranges: list[tuple[int, int]], gets: list[tuple[int, int]]
) -> None:
    asked: list[tuple[int, int | None]] = []

    class Remote(MemoryStore):
        def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
            asked.append((start, end))
            return super().get(name, start, end)

    store = Remote()
    content = os.urandom(1 << 20)
    store.blobs["segments/rank_0_000000.safetensors"] = content
    files = SegmentFiles(store)
    for _ in range(2):
        found = files.read_many("segments/rank_0_000000.safetensors", len(content), ranges)
        assert list(map(bytes, found)) == [content[begin:end] for begin, end in ranges]
    assert asked == gets * (1 if gets[-1][1] == len(content) else 2)
