"""A running capture, read by several threads that look at it anew."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.waiting import join
from tlcore.errors import MissingError
from tlcore_backends.safetensors import segment_source
from tlcore_backends.safetensors.listing import list_segments


def test_a_listing_begun_earlier_does_not_replace_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Identity())
    backend = {"name": "safetensors", "commit_s": 1000}
    with tlcore.capture(model, output_dir=tmp_path, backend=backend, log_step_ids=[]) as running:

        def commit(step: int) -> None:
            model(torch.full((2,), float(step)))
            running.session.flush()

        commit(0)
        run = tlcore.open_run(running.url)
        assert run.steps == [0]
        listed, go_on = threading.Event(), threading.Event()

        def slow(*arguments: Any) -> Any:
            found = list_segments(*arguments)
            if not listed.is_set():
                listed.set()
                assert go_on.wait(60)
            return found

        monkeypatch.setattr(segment_source, "list_segments", slow)
        early = threading.Thread(target=run.refresh)
        early.start()
        assert listed.wait(60)
        commit(1)
        late = threading.Thread(target=run.refresh)
        late.start()
        # Long enough for it to be done, if it did not wait for the other one.
        late.join(0.3)
        go_on.set()
        join([early, late])
        assert run.steps == [0, 1]
        assert torch.equal(run.tensor("step_1/0/outputs"), torch.full((2,), 1.0))


def test_a_missing_step_of_a_long_run_is_told_in_a_few_words(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity())
    with tlcore.capture(model, output_dir=tmp_path, backend="safetensors", log_step_ids=[]) as captured:
        for step in range(300):
            model(torch.full((2,), float(step)))
    with pytest.raises(MissingError, match=r"no step 300; it has 0-299$"):
        tlcore.open_run(captured.url).step(300)
