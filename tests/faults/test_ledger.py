"""The ledger: the same in ``step.json``, ``run.json``, the log's last line and ``run.ledger``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.faults.helpers import local
from tlcore.ledger import Counts
from tlcore_backends.storage.local import LocalStore


def fail_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the disk refuse the files of one step, or its directory, or the segment of that number."""
    put, begin_folder = LocalStore.put, LocalStore.begin_folder

    def refuse(name: str) -> None:
        if f"{name}/".startswith((f"step_{step}/", f"segments/rank_0_{step:06}")):
            raise tlcore.BackendError("on purpose")

    def refused_put(self: LocalStore, name: str, parts: Any) -> int:
        refuse(name)
        return put(self, name, parts)

    def refused_folder(self: LocalStore, name: str) -> Any:
        refuse(name)
        return begin_folder(self, name)

    monkeypatch.setattr(LocalStore, "put", refused_put)
    monkeypatch.setattr(LocalStore, "begin_folder", refused_folder)


@pytest.mark.parametrize("format", ["pt", "safetensors", "shards"])
def test_every_place_tells_the_same(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tlcore")
    fail_in(2, monkeypatch)
    module = nn.Sequential(nn.Linear(8, 2), nn.Identity(), nn.Linear(2, 2))
    keys: dict[str, Any] = {"output_dir": str(tmp_path), "backend": local(format), "max_tensor_size": 12}
    with tlcore.capture(module, log_step_ids=[], **{"module_call_match": ".", **keys}) as captured:
        for _ in range(4):
            module(torch.ones(4, 8))
    # A step: one input of 32 elements is skipped, five tensors of 8 are stored, two of them as aliases.
    expected = Counts(captured=24, stored=15, skipped=4, failed=5)
    ledger = captured.ledger
    assert ledger.balanced
    for column in ("captured", "stored", "skipped", "dropped", "failed"):
        assert getattr(ledger, column) == getattr(expected, column)
    assert ledger.reasons == {"skipped: larger than max_tensor_size": 4, "failed: BackendError": 5}

    run = tlcore.open_run(captured.url)
    assert run.ledger.to_json() == ledger.to_json()
    stated = json.loads((Path(captured.url) / "run.json").read_text())
    assert stated["ledger"] == ledger.to_json()
    steps = Counts()
    for number in run.steps:
        document = run.stored.source.document(number, 0)
        counts = Counts.from_json(document["ledger"])
        assert counts.balanced and counts.stored == len(document["records"]) == 5
        steps.add(counts)
    assert run.steps == [0, 1, 3]
    assert (steps.captured, steps.stored, steps.skipped) == (18, 15, 3)
    line = [record.getMessage() for record in caplog.records if record.name == "tlcore"][-1]
    assert f"{captured.url}: captured 24 = stored 15 + skipped 4 + dropped 0 + failed 5" in line
    assert str(dict(sorted(ledger.reasons.items()))) in line
