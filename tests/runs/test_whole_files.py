"""Segments that need not be written anew are taken as they are: the same files, checked where they lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.runs.test_convert import files, two_ranks
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.errors import ReadError, VerifyError
from tlcore.runs.convert import convert
from tlcore.runs.whole_files import take_rank
from tlcore.testing import RunWriter, make_record, make_run, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.segment_sink import SegmentSink

SEGMENTS = "safetensors"


def captured(output_dir: Path, backend: Any = SEGMENTS, steps: int = 4) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    keys: dict[str, Any] = {"log_step_ids": []}
    with tlcore.capture(model, output_dir=str(output_dir), backend=backend, **keys) as capture:
        for step in range(steps):
            model(torch.randn(3 + step % 2, 4))
    return Path(capture.url)


def converted(source: Path, target: Path, backend: Any = SEGMENTS, **keys: Any) -> Path:
    config = load_config(output_dir=str(target), backend=backend, **keys)
    return Path(convert(tlcore.open_run(source), config))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks whose files were taken as they are."""
    found: list[int] = []

    def noting(source: Any, documents: Any, on_tensors: Any) -> None:
        found.append(documents.run.rank)
        take_rank(source, documents, on_tensors)

    monkeypatch.setattr("tlcore.runs.convert.take_rank", noting)
    return found


def test_every_file_is_the_same(tmp_path: Path, taken: list[int]) -> None:
    source = captured(tmp_path / "a")
    there = converted(source, tmp_path / "b")
    assert taken == [0] and files(there) == files(source)
    run = tlcore.open_run(there)
    assert run.state == "complete" and run.verify() == tlcore.open_run(source).verify() > 20


def test_of_all_ranks(tmp_path: Path, taken: list[int]) -> None:
    own = converted(two_ranks(tmp_path / "a" / "run-1", PtSink), tmp_path / "b")
    assert not taken
    there = converted(own, tmp_path / "c")
    assert taken == [1, 0] and files(there) == files(own)
    assert files(converted(there, tmp_path / "d", "pt")) == files(tmp_path / "a" / "run-1")


def test_not_with_a_step_that_a_rank_lacks(tmp_path: Path, taken: list[int]) -> None:
    url = tmp_path / "a" / "run-1"
    for rank in (1, 0):
        run = make_run(url, rank, world_size=2, run_id="run-1")
        sink = RunWriter(SegmentSink(), run=run, backend=SEGMENTS)
        for step in range(1 + rank):
            name = f"step_{step}/a/outputs_cpu{'_rank_1' if rank else ''}"
            records = [make_record(name, torch.ones(2), rank)]
            sink.write(records)
            sink.commit_step(make_summary(step, records, rank))
        sink.close()
    source = tlcore.open_run(url)
    assert source.state == "complete" and source.incomplete_steps == [1]
    there = tlcore.open_run(converted(url, tmp_path / "b"))
    assert not taken and there.steps == [0] and not there.incomplete_steps


def test_without_a_catalogue(tmp_path: Path, taken: list[int]) -> None:
    source = captured(tmp_path / "a")
    (source / "segments/catalogue_rank_0.json").unlink()
    assert files(converted(source, tmp_path / "b")) == files(source) and taken


def test_each_tensor_is_told(tmp_path: Path) -> None:
    source, told = captured(tmp_path / "a"), list[int]()
    config = load_config(output_dir=str(tmp_path / "b"), backend=SEGMENTS)
    convert(tlcore.open_run(source), config, told.append)
    assert sum(told) == tlcore.open_run(source).ledger.stored


@pytest.mark.parametrize("name", ["segment_bytes", "commit_s"])
def test_who_says_how_segments_are_made_gets_others(tmp_path: Path, name: str, taken: list[int]) -> None:
    source = captured(tmp_path / "a")
    # Of one byte each, or one a step.
    there = converted(
        source, tmp_path / "b", {"name": SEGMENTS, name: {"segment_bytes": 1, "commit_s": 0}[name]}
    )
    assert not taken and len([*there.glob("segments/*_steps_*.json")]) == 4
    # And many small ones are put together.
    again = converted(there, tmp_path / "c")
    assert not taken and len([*again.glob("segments/*_steps_*.json")]) < 4
    assert files(converted(again, tmp_path / "d", "pt")) == files(converted(source, tmp_path / "e", "pt"))


Change = Callable[[Path], object]


def _byte(run: Path) -> None:
    (file,) = run.glob("segments/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _cut(run: Path) -> None:
    (file,) = run.glob("segments/*.safetensors")
    os.truncate(file, file.stat().st_size - 8)


def _calls(run: Path) -> None:
    (file,) = run.glob("segments/*_steps_*.json")
    index = json.loads(file.read_text())
    index["calls"][0] = "../x"
    file.write_text(json.dumps(index))


def _gone(run: Path) -> None:
    next(run.glob("segments/*.safetensors")).unlink()


def _index(run: Path) -> None:
    next(run.glob("segments/*_steps_*.json")).write_text("{")


@pytest.mark.parametrize("change", [_byte, _cut, _calls, _gone, _index])
def test_damage_is_found_in_the_copy(tmp_path: Path, change: Change, taken: list[int]) -> None:
    source = captured(tmp_path / "a")
    change(source)
    before = files(source)
    with pytest.raises((ReadError, VerifyError)) as caught:
        converted(source, tmp_path / "b")
    assert taken == [0] and str(caught.value)
    assert tlcore.open_run(tmp_path / "b" / source.name).state == "incomplete"
    assert files(source) == before


def test_a_link_out_of_the_run_is_not_followed(tmp_path: Path, taken: list[int]) -> None:
    source = captured(tmp_path / "a")
    (file,) = source.glob("segments/*.safetensors")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReadError, match="symbolic link"):
        converted(source, tmp_path / "b")
    assert taken and not [*(tmp_path / "b").rglob("*.safetensors")]


@pytest.mark.parametrize("own", ["pt", SEGMENTS])
@pytest.mark.parametrize("other", ["pt", SEGMENTS])
def test_fsync_is_handed_on(
    tmp_path: Path, own: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = captured(tmp_path / "a", own)
    plain, synced = os.fsync, set[int]()

    def noting(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        plain(handle)

    monkeypatch.setattr(os, "fsync", noting)
    converted(source, tmp_path / "b", other)
    assert not synced
    assert main(["convert", str(source), str(tmp_path / "c"), "--backend", other, "--fsync"]) == 0
    there = Path(capsys.readouterr().out.strip())
    assert {path.stat().st_ino for path in (there, *there.rglob("*"))} <= synced
