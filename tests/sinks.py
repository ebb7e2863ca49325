"""A sink that keeps everything in memory, for tests that look at what the engine hands over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tlcore.record import Record, RunInfo, StepSummary


class MemorySink:
    """Clones what it is given; ``fail_at`` names the sink call that raises OSError."""

    def __init__(self, fail_at: str = "") -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: dict[str, Record] = {}
        self.steps: list[StepSummary] = []
        self.run: RunInfo | None = None
        self.closed = False
        self.fail_at = fail_at

    def _maybe_fail(self, where: str) -> None:
        if self.fail_at == where:
            raise OSError(28, "No space left on device")

    def open(self, run: RunInfo) -> None:
        self._maybe_fail("open")
        self.run = run

    def write(self, batch: Sequence[Record]) -> None:
        self._maybe_fail("write")
        for record in batch:
            self.tensors[record.name] = record.tensor().clone()
            self.records[record.name] = record

    def commit_step(self, step: StepSummary) -> None:
        self._maybe_fail("commit_step")
        self.steps.append(step)

    def close(self) -> None:
        self._maybe_fail("close")
        self.closed = True
