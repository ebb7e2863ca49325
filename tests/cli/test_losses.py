"""What was lost at capture is told by every command that sums a run up."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.faults.helpers import STEP_TENSORS, capture
from tests.reading import command
from tlcore.__main__ import main
from tlcore.errors import VerifyError
from tlcore.hotpath.copying import write_all
from tlcore.ledger import Counts
from tlcore.reader import list_runs
from tlcore.testing import RunWriter, make_record, make_run, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.storage import atomic_file as unfinished
from tlcore_backends.storage import local as stores
from tlcore_backends.storage import unfinished_folder

STEPS = 5
LOST = "at capture 24 of 30 tensors failed and are not in the run"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was closed after a disk had taken its first step only."""

    def full(handle: int, parts: Any, *_: object) -> int:
        pieces = list(parts)
        if sum(len(piece) for piece in pieces) > 8192:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_all(handle, pieces)

    def no_files(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(captured: tlcore.capture, step: int) -> None:
        if step == 1:
            captured.session.flush()
            monkeypatch.setattr(unfinished, "write_all", full)
            # A step that is like one before is made as a whole.
            monkeypatch.setattr(unfinished_folder, "make_files", no_files)

    outcome = capture({"output_dir": str(tmp_path / "runs"), "backend": "pt"}, STEPS, fill)
    monkeypatch.undo()
    counts = outcome.ledger
    assert (counts.captured, counts.stored) == (STEPS * STEP_TENSORS, STEP_TENSORS)
    return Path(outcome.url)


def closed_run(place: Path, **counts: int) -> Path:
    """A run with one stored tensor, and a ledger that holds ``counts`` beside it."""
    directory = place / "run"
    info = make_run(directory)
    sink = RunWriter(PtSink(), run=info, backend="pt")
    record = make_record("step_0/a/outputs_cpu", torch.ones(2))
    sink.write([record])
    sink.commit_step(make_summary(0, [record]))
    ledger = {"captured": 1 + sum(counts.values()), "stored": 1, **counts}
    info.ledger.add(Counts.from_json(ledger))
    sink.close()
    return directory


def test_ls_tells_in_both_listings(run: Path) -> None:
    header, row = command("ls", str(run.parent))[1].splitlines()
    assert header.endswith("bytes  lost at capture")
    assert row.endswith("24 failed of 30")
    (listed,) = json.loads(command("ls", str(run.parent), "--json")[1])["runs"]
    assert (listed["captured"], listed["dropped"], listed["failed"]) == (30, 0, 24)
    for more in ([], ["--step", "0"]):
        assert command("ls", str(run), *more)[1].splitlines()[0].endswith(f"  {LOST}")


def test_verify_tells_and_answers_for_what_is_stored(run: Path) -> None:
    status, text = command("verify", str(run))
    assert status == 0
    assert text.endswith(f"complete  {STEP_TENSORS} tensors sound  {LOST}\n")
    status, text = command("verify", str(run), "--json")
    assert status == 0
    document = json.loads(text)
    assert document["sound"] == STEP_TENSORS
    assert (document["ledger"]["captured"], document["ledger"]["failed"]) == (30, 24)
    assert sum(document["ledger"]["reasons"].values()) == 24


def test_convert_notes_what_the_new_run_lacks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "step_1").mkdir(exist_ok=True)
    (run / "step_1/module_calls.txt").write_text("0\n")
    assert main(["convert", str(run), str(tmp_path / "there"), "--backend", "safetensors"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'there' / run.name}\n"
    assert shown.err == f"note: not committed, so left out: steps 1\nnote: {LOST}\n"
    assert tlcore.open_run(shown.out.strip()).ledger.failed == 24


def test_skipped_tensors_are_no_losses_and_a_sound_run_looks_as_ever(tmp_path: Path) -> None:
    run = closed_run(tmp_path, skipped=7)
    listing = command("ls", str(tmp_path))[1]
    assert "lost" not in listing and "skipped" not in listing
    for words in (["ls", str(run)], ["verify", str(run)], ["convert", str(run), str(tmp_path / "there")]):
        text = command(*words, *(["--backend", "pt"] if words[0] == "convert" else []))[1]
        assert "at capture" not in text and "note:" not in text


def test_dropped_and_failed_are_told_apart(tmp_path: Path) -> None:
    run = closed_run(tmp_path, dropped=2, failed=3, skipped=4)
    expected = "at capture 2 of 10 tensors were dropped and 3 of 10 tensors failed and are not in the run"
    assert expected in command("verify", str(run))[1]
    assert "2 dropped, 3 failed of 10" in command("ls", str(tmp_path))[1]


def test_a_damaged_ledger_is_damage_and_hides_no_listing(tmp_path: Path) -> None:
    run = closed_run(tmp_path)
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "ledger": {"failed": "many"}}))
    status, text = command("ls", str(run))
    assert status == 0 and "its ledger cannot be read" in text
    status, text = command("verify", str(run))
    assert status == 1 and "damaged ledger" in text
    document = json.loads(command("verify", str(run), "--json")[1])
    assert document["ledger"] is None and len(document["bad"]) == 1


def test_the_listing_reads_one_file_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed_run(tmp_path, failed=1)
    read: list[str] = []
    get = stores.LocalStore.get

    def counted(store: Any, name: str, *where: Any) -> bytes:
        read.append(name)
        return get(store, name, *where)

    monkeypatch.setattr(stores.LocalStore, "get", counted)
    (listed,) = list_runs(tmp_path)
    assert (listed.failed, read) == (1, ["run.json"])


@pytest.mark.parametrize("backend", ["pt", {"name": "safetensors", "commit_s": 0}])
@pytest.mark.parametrize("gone", [[1], [4], [0, 1, 2, 3, 4]])
def test_steps_that_are_gone_from_a_whole_run_are_told(
    tmp_path: Path, backend: Any, gone: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = capture({"output_dir": str(tmp_path / "runs"), "backend": backend}, STEPS)
    directory = Path(outcome.url)
    assert main(["verify", outcome.url]) == 0
    for step in gone:
        if backend == "pt":
            shutil.rmtree(directory / f"step_{step}")
        else:
            for file in (directory / "segments").glob(f"rank_0_00000{step}*"):
                file.unlink()
    if backend != "pt":
        (directory / "segments" / "catalogue_rank_0.json").unlink()
    left = [step for step in range(STEPS) if step not in gone]
    run = tlcore.open_run(outcome.url)
    assert run.state == "complete" and run.steps == left
    numbers = f"{len(left) * STEP_TENSORS} of them: others are gone"
    with pytest.raises(VerifyError, match=f"{STEPS * STEP_TENSORS} tensors were stored, and .* {numbers}"):
        run.verify()
    assert main(["verify", outcome.url]) == 1
    assert "are gone" in capsys.readouterr().out
    assert main(["convert", outcome.url, str(tmp_path / "there"), "--backend", "pt"]) == 0
    kept = f"{STEPS * STEP_TENSORS} tensors were stored, and the steps that are there have"
    assert f"{kept} {len(left) * STEP_TENSORS}" in capsys.readouterr().err
