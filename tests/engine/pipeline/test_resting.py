"""After small steps the pipeline's thread rests, and never while anybody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.waiting import time_limit, wait_until
from tlcore.engine.pipeline import executors
from tlcore.engine.staging import host_memory

_CHUNK_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest that only ends when it is ended."""
    monkeypatch.setattr(executors, "_REST_S", 100_000.0)


def test_whoever_waits_for_what_was_captured_ends_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    with (
        time_limit(60, "a flush and a close"),
        tlcore.capture(model, output_dir=tmp_path, backend="safetensors", log_step_ids=[]) as captured,
    ):
        for step in range(3):
            model(torch.full((2,), float(step)))
        captured.session.flush()
        assert captured.ledger.stored == captured.ledger.captured > 0
        model(torch.zeros(2))
        captured.session.flush_soon().wait(60)
        assert len(tlcore.open_run(captured.url).steps) == 4
        model(torch.zeros(2))
    assert tlcore.open_run(captured.url).steps == list(range(5))


def test_the_last_selected_step_is_stored_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    with tlcore.capture(model, output_dir=tmp_path, backend="safetensors", log_step_ids=[0, 2]) as captured:
        for step in range(3):
            model(torch.full((2,), float(step)))
        wait_until(lambda: tlcore.open_run(captured.url).steps == [0, 2], "both steps are stored")


@pytest.mark.parametrize("chunks", [0.4, 2], ids=["less than a chunk", "several chunks"])
def test_memory_that_runs_short_ends_it(
    chunks: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", _CHUNK_BYTES)
    model = nn.Sequential(nn.Identity())
    keys: dict[str, Any] = {
        "output_dir": tmp_path,
        "backend": "safetensors",
        "log_step_ids": [],
        "module_call_match": "^0$",
    }
    limit: dict[str, Any] = {"queue_bytes": 8 * _CHUNK_BYTES, "block_s": 1000}
    with (
        time_limit(100, "steps that need each other's memory"),
        tlcore.capture(model, **keys, **limit) as run,
    ):
        model(torch.zeros(2))
        large = torch.zeros(int(chunks * _CHUNK_BYTES) // 4)
        for step in range(30):
            model(large.fill_(float(step)))
    assert run.ledger.stored == run.ledger.captured == 2 * 31


def test_a_queue_that_drops_does_not_rest(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    keys: dict[str, Any] = {"output_dir": tmp_path, "log_step_ids": [], "on_full": "drop"}
    with tlcore.capture(model, **keys, backend={"name": "safetensors", "commit_s": 0.05}) as captured:
        model(torch.zeros(2))
        model(torch.ones(2))
        # Two tensors of the module in each step, and two of the captured root.
        wait_until(lambda: captured.ledger.stored == 8, "the steps are stored by themselves")
