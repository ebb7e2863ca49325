"""Runs at a URL are listed by their own documents, whatever else they hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.reader import list_runs
from tlcore.storage import Entry
from tlcore_backends.storage.remote import FsspecStore


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_no_object_of_a_run_is_listed(
    format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://listing-runs-{format}"
    model = nn.Sequential(nn.Identity())
    backend = {"name": "fsspec", "format": format, "url": url, "storage_options": {}}
    for steps in (2, 3):
        with tlcore.capture(model, backend=backend, log_step_ids=[]):
            for step in range(steps):
                model(torch.full((2,), float(step)))
    whole: list[str] = []
    listed = FsspecStore.list

    def noted(store: FsspecStore, prefix: str = "") -> Iterator[Entry]:
        whole.append(prefix)
        return listed(store, prefix)

    monkeypatch.setattr(FsspecStore, "list", noted)
    runs = list_runs(url)
    assert [run.state for run in runs] == ["complete", "complete"]
    assert [run.steps for run in runs] == [2, 3]
    if format == "safetensors":
        assert whole == []
    assert main(["ls", url]) == 0
    assert capsys.readouterr().out.count("complete") == 2
