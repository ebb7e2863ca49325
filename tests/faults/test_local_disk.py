"""Faults of the local disk: full, broken, read-only, gone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import tlcore
from tests.faults.helpers import (
    SLACK_S,
    STEP_TENSORS,
    Outcome,
    assert_whole,
    capture,
    files_below,
    local,
)
from tests.sinks import MemorySink
from tlcore.__main__ import main
from tlcore_backends.safetensors import segment_sink, step_files
from tlcore_backends.storage import atomic_file as unfinished
from tlcore_backends.storage import unfinished_folder

BLOCK_S = 1.0
FORMATS = ["pt", "safetensors", "shards"]
ROOT = Path(__file__).parents[2]


def assert_unhurt(outcome: Outcome, steps: int, lines: int = 2) -> None:
    assert outcome.same_outputs
    assert max(outcome.step_s) < BLOCK_S + SLACK_S
    assert outcome.close_s < SLACK_S
    assert outcome.ledger.balanced
    assert outcome.ledger.captured == steps * STEP_TENSORS
    assert 1 <= len(outcome.warnings) <= lines
    assert "could not be stored and counts as failed" in outcome.warnings[0]


def assert_earlier_steps_are_sound(outcome: Outcome, steps: list[int], directory: Path | None = None) -> None:
    run = tlcore.open_run(directory or outcome.url)
    assert run.steps == steps
    assert run.verify() == len(steps) * STEP_TENSORS
    assert outcome.ledger.stored == len(steps) * STEP_TENSORS
    assert_no_half_file(Path(run.url))


def assert_no_half_file(directory: Path) -> None:
    """Whatever has a final name is whole."""
    import torch
    from safetensors import safe_open

    for path in (path for path in directory.rglob("*") if path.is_file()):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as shard:
                assert list(shard.keys())


def at(step: int, fault: Callable[[Path], None]) -> Callable[[tlcore.capture, int], None]:
    def before_step(captured: tlcore.capture, number: int) -> None:
        if number == step:
            captured.session.flush()
            fault(Path(captured.url))

    return before_step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(place)],
        capture_output=True,
        check=False,
        timeout=120,
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs; test_a_file_size_limit covers the same path")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=120)


def fill(run: Path) -> None:
    """Leave room for a step and a half."""
    with suppress(OSError), (run.parent / "ballast").open("wb") as file:
        status = os.statvfs(run)
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - 80_000)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk(format: str, small_disk: Path) -> None:
    outcome = capture(
        {"output_dir": str(small_disk / "runs"), "backend": local(format), "block_s": BLOCK_S}, 5, at(2, fill)
    )
    assert_unhurt(outcome, 5)
    assert "No space left on device" in outcome.warnings[0]
    assert outcome.ledger.failed > 0
    run = tlcore.open_run(outcome.url)
    assert run.steps[:2] == [0, 1]
    assert_earlier_steps_are_sound(outcome, run.steps)
    assert not list(Path(outcome.url).rglob("*.tmp"))


def test_a_disk_that_is_full_in_the_middle_of_a_large_step(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes to the disk while it comes: what was written of it is gone."""
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1000)
    monkeypatch.setattr(step_files, "RESERVE", 8 << 10)
    backend = {**local("safetensors"), "segment_bytes": 30_000}
    config = {"output_dir": str(small_disk / "runs"), "backend": backend, "block_s": BLOCK_S}
    outcome = capture(config, 5, at(2, fill))
    assert_unhurt(outcome, 5)
    assert "No space left on device" in outcome.warnings[0]
    assert outcome.ledger.failed > 0
    run = tlcore.open_run(outcome.url)
    assert run.steps[:2] == [0, 1]
    assert_earlier_steps_are_sound(outcome, run.steps)
    files = [path for path in Path(outcome.url).rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".tmp"]
    indexes = [path.name for path in files if "_steps_" in path.name]
    data = [path.name for path in files if path.suffix == ".safetensors"]
    assert all(any(index.startswith(name[:13]) for index in indexes) for name in data)


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_is_closed_and_its_ledger_told_without_a_byte_of_room(format: str, small_disk: Path) -> None:
    def fill_whole(run: Path) -> None:
        with suppress(OSError), (run.parent / "ballast").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    config = {"output_dir": str(small_disk / "runs"), "backend": local(format), "block_s": BLOCK_S}
    outcome = capture(config, 5, at(2, fill_whole))
    assert_unhurt(outcome, 5)
    assert outcome.ledger.failed > 0
    run = tlcore.open_run(outcome.url)
    assert run.state == "complete"
    assert run.ledger == outcome.ledger
    assert_earlier_steps_are_sound(outcome, run.steps)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_with_room_elsewhere_loses_nothing(
    format: str, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spill = tmp_path / "spill"
    keys = {
        "output_dir": str(small_disk / "runs"),
        "backend": local(format),
        "spill_dir": str(spill),
        "block_s": BLOCK_S,
    }
    outcome = capture(keys, 5, at(2, fill))
    assert outcome.same_outputs and outcome.ledger.stored == 5 * STEP_TENSORS
    assert len(outcome.warnings) == 2
    (small_disk / "runs/ballast").unlink()
    assert main(["push", str(spill), "--force"]) == 0
    assert_whole(outcome, tlcore.open_run(outcome.url), 5)
    assert list(spill.iterdir()) == []


LIMITED = """
import resource, signal, sys
from tests.faults.helpers import capture, local
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(captured, step):
    if step == 2:
        captured.session.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
outcome = capture({"output_dir": sys.argv[1], "backend": local(sys.argv[2]), "block_s": 1.0}, 4, limit)
counts = outcome.ledger
print(outcome.same_outputs, counts.balanced, counts.stored, counts.failed, len(outcome.warnings), outcome.url)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_size_limit(format: str, tmp_path: Path) -> None:
    done = program(LIMITED, str(tmp_path / "runs"), format)
    assert done.returncode == 0, done.stderr
    same, balanced, stored, failed, lines, url = done.stdout.split()
    assert (same, balanced, stored, failed) == ("True", "True", "12", "12")
    assert int(lines) <= 2
    run = tlcore.open_run(url)
    assert run.steps == [0, 1] and run.verify() == 12
    assert_no_half_file(Path(url))


def program(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_broken_disk(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own write answers EIO from the third step on, of a file or of a step's whole directory."""

    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fault_begins(run: Path) -> None:
        monkeypatch.setattr(unfinished, "write_all", broken)
        monkeypatch.setattr(unfinished_folder, "make_files", broken)

    fault = at(2, fault_begins)
    outcome = capture({"output_dir": str(tmp_path), "backend": local(format), "block_s": BLOCK_S}, 4, fault)
    monkeypatch.undo()
    assert_unhurt(outcome, 4)
    assert "Input/output error" in outcome.warnings[0]
    assert outcome.ledger.reasons["failed: BackendError"] == 2 * STEP_TENSORS
    assert_earlier_steps_are_sound(outcome, [0, 1])
    assert not list(Path(outcome.url).rglob("*.tmp"))


def test_a_sink_whose_every_call_fails_in_turn() -> None:
    for call in ("write", "commit_step", "close"):
        outcome = capture({"backend": MemorySink(fail_at=call), "block_s": BLOCK_S}, 3)
        assert outcome.same_outputs and outcome.ledger.balanced
        assert outcome.ledger.stored == (3 * STEP_TENSORS if call == "close" else 0)
        assert len(outcome.warnings) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_read_only_remount(format: str, small_disk: Path) -> None:
    def remount(how: str) -> None:
        # A mount point of its own, whatever the writer holds open at the moment.
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True, timeout=120)

    keys = {"output_dir": str(small_disk / "runs"), "backend": local(format), "block_s": BLOCK_S}
    outcome = capture(keys, 4, at(2, lambda run: remount("ro")))
    assert_unhurt(outcome, 4)
    assert "Read-only file system" in outcome.warnings[0]
    assert_earlier_steps_are_sound(outcome, [0, 1])
    assert tlcore.open_run(outcome.url).state == "incomplete"


FORBIDDEN = """
import os, sys
from tests.faults.helpers import capture, local
if os.geteuid() == 0:
    # Everything is loaded first: another user may not read this Python.
    capture({"output_dir": sys.argv[1] + "/warm", "backend": local(sys.argv[2])}, 1)
    os.mkdir(sys.argv[1] + "/own")
    os.chown(sys.argv[1] + "/own", 12345, 12345)
    os.setgroups([]); os.setgid(12345); os.setuid(12345)
def forbid(captured, step):
    if step == 2:
        captured.session.flush()
        change(captured.url, 0o500)
def change(run, mode):
    for directory in (run, run + "/segments"):
        if os.path.isdir(directory):
            os.chmod(directory, mode)
keys = {"output_dir": sys.argv[1] + "/own", "backend": local(sys.argv[2]), "block_s": 1.0}
outcome = capture(keys, 4, forbid)
change(outcome.url, 0o700)
counts = outcome.ledger
print(outcome.same_outputs, counts.balanced, counts.stored, counts.failed, outcome.url)
print("|".join(outcome.warnings))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_permission_taken_away(format: str, tmp_path: Path) -> None:
    """As an ordinary user: root may write anything."""
    place = Path("/tmp") / f"tlcore-permission-{os.getpid()}-{format}"
    place.mkdir(mode=0o755)
    try:
        done = program(FORBIDDEN, str(place), format)
        assert done.returncode == 0, done.stderr
        first, lines = done.stdout.splitlines()
        same, balanced, stored, failed, url = first.split()
        assert (same, balanced, stored, failed) == ("True", "True", "12", "12")
        assert "Permission denied" in lines and len(lines.split("|")) <= 2
        run = tlcore.open_run(url)
        assert run.steps == [0, 1] and run.verify() == 12
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("format", FORMATS)
def test_the_directory_deleted_in_the_run(format: str, tmp_path: Path) -> None:
    outcome = capture(
        {"output_dir": str(tmp_path), "backend": local(format), "block_s": BLOCK_S}, 4, at(2, shutil.rmtree)
    )
    assert_unhurt(outcome, 4)
    assert "No such file or directory" in outcome.warnings[0]
    assert (outcome.ledger.stored, outcome.ledger.failed) == (2 * STEP_TENSORS, 2 * STEP_TENSORS)
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("format", FORMATS)
def test_the_directory_moved_away_with_a_spill_dir(format: str, tmp_path: Path) -> None:
    def move(run: Path) -> None:
        run.rename(tmp_path / "moved")
        run.write_text("in the way")

    keys = {
        "output_dir": str(tmp_path / "runs"),
        "spill_dir": str(tmp_path / "spill"),
        "backend": local(format),
    }
    (tmp_path / "runs").mkdir(mode=0o700)
    outcome = capture({**keys, "block_s": BLOCK_S}, 4, at(2, move))
    assert outcome.same_outputs and outcome.ledger.stored == 4 * STEP_TENSORS
    os.unlink(outcome.url)
    (tmp_path / "moved").rename(outcome.url)
    assert main(["push", str(tmp_path / "spill"), "--force"]) == 0
    assert_whole(outcome, tlcore.open_run(outcome.url), 4)
