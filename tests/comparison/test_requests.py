"""Runs with request rows, as vLLM's have, compared per request and position whatever the batches were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tlcore.schema import load_config
from tlcore.session import Session, new_run

PROMPTS = {"x": torch.randn(5, 4), "y": torch.randn(3, 4), "z": torch.randn(4, 4)}
Batch = Sequence[tuple[str, int, int]]


def serve(out: Path, batches: Sequence[Batch], scale: float = 1.0) -> str:
    """Run batches of (request, first position, end position) through a model that treats rows alone."""
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.eye(4) * scale
    root = nn.Sequential(linear, nn.ReLU())
    config = load_config(output_dir=str(out), log_step_ids=[])
    session = Session(config, new_run(config))
    session.attach(root)
    for batch in batches:
        rows, first = [], 0
        for request, begin, end in batch:
            row = {"request_id": f"{request}-0a1b2c3d", "external_request_id": request}
            rows.append({**row, "first_row": first, "rows": end - begin, "first_position": begin})
            first += end - begin
        session.begin_step()
        root(torch.cat([PROMPTS[request][begin:end] for request, begin, end in batch]))
        session.end_step(rows=rows)
    session.close()
    return session.url


ORDERED = [[("x", 0, 5), ("y", 0, 3), ("z", 0, 4)]]
REORDERED = [[("z", 0, 4), ("x", 0, 2)], [("x", 2, 5), ("y", 0, 3)]]


@pytest.mark.parametrize("deep", [False, True])
def test_other_batches_of_the_same_requests_agree(tmp_path: Path, deep: bool) -> None:
    result = tlcore.compare(serve(tmp_path, ORDERED), serve(tmp_path, REORDERED), deep=deep)
    assert result.equal and result.counts["missing"] == 0
    assert {each.request for each in result.results} == {"x", "y", "z"}
    # Request x was computed in two pieces: four tensors, four spans.
    assert len(result.results) == 4 * 4


def test_the_divergence_names_the_request(tmp_path: Path) -> None:
    changed = serve(tmp_path, REORDERED, scale=2.0)
    found = tlcore.compare(serve(tmp_path, ORDERED), changed).to_json()["first_divergence"]
    assert (found["module"], found["born"], found["first_position"]) == ("0", True, 0)


def test_a_request_or_position_that_one_run_lacks_is_missing(tmp_path: Path) -> None:
    whole = serve(tmp_path, ORDERED)
    for batches in ([[("x", 0, 5), ("y", 0, 3)]], [[("x", 0, 5), ("y", 0, 3), ("z", 1, 4)]]):
        part = serve(tmp_path, batches)
        assert {each.request for each in tlcore.compare(whole, part).results if not each.agrees} == {"z"}
        assert not tlcore.compare(part, whole).equal


def test_request_ids_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = serve(tmp_path, [[("x", 0, 5), ("y", 0, 3)]])
    monkeypatch.setitem(PROMPTS, "p", PROMPTS["x"])
    monkeypatch.setitem(PROMPTS, "q", PROMPTS["y"])
    b = serve(tmp_path, [[("q", 0, 3), ("p", 0, 5)]])
    assert not tlcore.compare(a, b).equal
    assert tlcore.compare(a, b, requests={"x": "p", "y": "q"}).equal
