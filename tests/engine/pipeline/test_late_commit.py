"""A sink may accept steps and store them later; the ledger waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tlcore.config.configuration import load_config
from tlcore.engine.new_run import new_run
from tlcore.engine.session import Session
from tlcore.errors import BackendError
from tlcore.protocols import StepStored, SupportsLateCommit
from tlcore.record import Record, RunInfo, StepSummary


class LateSink:
    """Stores what it has accepted when it is flushed or closed; ``failing`` steps cannot be stored."""

    def __init__(self, failing: Sequence[int] = (), forgets: bool = False) -> None:
        self.failing = failing
        self.forgets = forgets
        self.accepted: list[int] = []
        self.flushes = 0
        self.flushed = threading.Event()

    def tell_stored(self, stored: StepStored) -> None:
        self.stored = stored

    def open(self, run: RunInfo) -> None:
        self.run = run

    def write(self, batch: Sequence[Record]) -> None:
        self.run.hold(sum(record.nbytes for record in batch))

    def commit_step(self, step: StepSummary) -> None:
        self.accepted.append(step.step)

    def flush(self) -> None:
        self.flushes += 1
        steps, self.accepted = self.accepted, []
        for step in steps:
            self.stored(step, BackendError("no room") if step in self.failing else None)
        self.flushed.set()

    def close(self) -> None:
        if not self.forgets:
            self.flush()


def opened(sink: LateSink, tmp_path: Path, steps: list[int], inline: bool = False) -> tuple[Session, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = load_config({"output_dir": str(tmp_path), "log_step_ids": steps})
    session = Session(config, new_run(config), sink, inline)
    session.attach(model)

    def run() -> None:
        session.begin_step()
        with torch.no_grad():
            model(torch.randn(2, 4))
        session.end_step()

    return session, run


def test_the_ledger_waits_until_steps_are_stored(tmp_path: Path) -> None:
    for inline in (False, True):
        sink = LateSink(failing=[1])
        assert isinstance(sink, SupportsLateCommit)
        session, step = opened(sink, tmp_path, [], inline)
        for _ in range(3):
            step()
        assert session.ledger.captured == 0
        session.flush()
        counts = session.ledger
        assert counts.captured == 3 * counts.stored // 2 and counts.balanced
        assert counts.failed == counts.stored // 2 and counts.reasons["failed: BackendError"] == counts.failed
        assert session.failing is None
        session.close()


def test_the_last_selected_step_is_not_kept_waiting(tmp_path: Path) -> None:
    sink = LateSink()
    session, step = opened(sink, tmp_path, [0, 2])
    for _ in range(2):
        step()
    assert not sink.flushed.wait(0.2)
    step()
    assert sink.flushed.wait(60)
    session.flush()
    assert session.ledger.stored == session.ledger.captured > 0
    session.close()


def test_what_a_sink_never_tells_counts_as_failed(tmp_path: Path) -> None:
    session, step = opened(LateSink(forgets=True), tmp_path, [])
    step()
    session.close()
    assert session.ledger.failed == session.ledger.captured > 0 and session.ledger.balanced


def test_what_a_sink_keeps_counts_in_the_queue(tmp_path: Path) -> None:
    session, step = opened(LateSink(), tmp_path, [])
    step()
    session.flush()
    kept = 8 * (8 + 8)
    assert session.queue_bytes in (kept, kept // 2)
    session.close()
