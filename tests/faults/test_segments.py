"""Runs in segments whose process is killed: what an index commits is whole, the rest means nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.backends.safetensors.emitting import RUNNING, opened
from tlcore.hotpath.copying import write_all
from tlcore.reader.run import Run
from tlcore.storage import Buffer
from tlcore.testing import MemoryStore
from tlcore_backends.safetensors import segment_sink
from tlcore_backends.safetensors.segment_source import SegmentSource
from tlcore_backends.storage import atomic_file

DOCUMENT = {
    "layout": 2,
    "run_id": "run",
    "world_size": 1,
    "backend": "safetensors",
    "ledger": {},
    "config": {},
}


def test_a_killed_process_loses_what_no_index_commits(tmp_path: Path) -> None:
    script = (
        "import os, sys, time, torch, tlcore\n"
        "module = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "backend = {'name': 'safetensors', 'commit_s': 0.3}\n"
        "with tlcore.capture(module, output_dir=sys.argv[1], backend=backend, log_step_ids=[]) as captured:\n"
        "    for step in range(10_000):\n"
        "        module(torch.full((2, 4), float(step)))\n"
        "        time.sleep(0.01)\n"
        "        if captured.ledger.stored >= 20:\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120).returncode == -9
    (path,) = tmp_path.iterdir()
    run = tlcore.open_run(path)
    assert run.state == "incomplete" and len(run.steps) >= 10
    assert run.steps == list(range(len(run.steps)))
    assert run.verify() == run.ledger.stored >= 20
    for step in run.steps:
        assert torch.equal(run.tensor(f"step_{step}/0/inputs_0"), torch.full((2, 4), float(step)))


class Snapshots(MemoryStore):
    """Remembers what is there after each change: what a process that dies then leaves in object storage."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[dict[str, bytes]] = []
        self._order = threading.Lock()

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        with self._order:
            size = super().put(name, parts)
            self.taken.append(dict(self.blobs))
            return size


@pytest.mark.parametrize("segment_bytes", [300, 4000, 1 << 20])
def test_whatever_upload_is_the_last_one_what_is_committed_is_whole(segment_bytes: int) -> None:
    store = Snapshots()
    sink, emitter = opened(store, commit_s=100, segment_bytes=segment_bytes)
    for step in range(12):
        # The eighth is larger than a segment.
        large = {f"m{n}/outputs_cpu": torch.randn(40, 8) for n in range(5)} if step == 8 else {}
        emitter.step(step, {"a/outputs_cpu": torch.randn(2 + step % 3, 8), **large})
        if step == 5:
            sink.flush()
    sink.close()
    committed = 0
    for blobs in store.taken:
        left = MemoryStore()
        left.blobs.update(blobs)
        source = SegmentSource(left, RUNNING)
        steps = list(source.steps)
        assert steps == list(range(len(steps))) and len(steps) >= committed
        committed = len(steps)
        emitter.check(source, steps)
        run = Run(left, {**DOCUMENT, "state": "running"})
        assert run.verify() == sum(len(emitter.documents[step]["records"]) for step in steps)
    assert committed == 12


def test_whatever_call_of_the_file_system_is_the_last_one_what_is_committed_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's directory as it is before and after each file gets its name, and with half of its bytes."""
    live, left = tmp_path / "live", tmp_path / "left"
    plain_write, plain_rename, number = write_all, os.rename, itertools.count()

    def look() -> None:
        shutil.copytree(live, left / f"{next(number):04}")

    def in_halves(handle: int, parts: Any, *_: object) -> int:
        data = b"".join(map(bytes, parts))
        written = plain_write(handle, [data[: len(data) // 2]])
        look()
        return written + plain_write(handle, [data[len(data) // 2 :]])

    def rename(source: Any, target: Any) -> None:
        look()
        plain_rename(source, target)
        look()

    monkeypatch.setattr(atomic_file, "write_all", in_halves)
    monkeypatch.setattr(os, "rename", rename)
    # Written while they come, and put together in memory.
    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 2000)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    backend = {"name": "safetensors", "commit_s": 1000, "segment_bytes": 4000}
    sizes = [2, 3, 2, 60, 2, 50, 2]
    with tlcore.capture(model, output_dir=live, backend=backend, log_step_ids=[]) as captured:
        for step, rows in enumerate(sizes):
            model(torch.full((rows, 16), float(step)))
            captured.session.flush()
    monkeypatch.undo()
    committed = 0
    for place in sorted(left.iterdir()):
        (path,) = place.iterdir()
        if not (path / "run.json").exists():
            continue
        run = tlcore.open_run(path)
        assert run.steps == list(range(len(run.steps))) and len(run.steps) >= committed
        committed = len(run.steps)
        for step in run.steps:
            assert torch.equal(
                run.tensor(f"step_{step}/0/inputs_0"), torch.full((sizes[step], 16), float(step))
            )
        assert run.verify() == run.ledger.stored
    assert committed == len(sizes)
