"""A request's rows are read without the others that a step computed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reader.dataset.served import NAMES, Served
from tlcore.errors import ReadError
from tlcore.reader import Run, open_run
from tlcore.reader.stored import Stored
from tlcore_backends.pt.source import PtSource
from tlcore_backends.safetensors.segment_source import SegmentSource

BACKENDS: dict[str, Any] = {
    "pt": "pt",
    "segments": "safetensors",
    "shards": {"name": "safetensors", "layout": 1},
}


@pytest.fixture(scope="module", params=BACKENDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Served(seed=3).run(tmp_path_factory.mktemp(request.param), BACKENDS[request.param])


def _by_steps(run: Run, identity: str, name: str) -> torch.Tensor:
    """A request's rows as whole tensors have them: the last one of each position."""
    found: dict[int, torch.Tensor] = {}
    for step in map(run.step, run.steps):
        for row in step.rows or ():
            if row["request_id"] == identity:
                whole = step.tensor(f"step_{step.number}/{name}")
                found |= {
                    row["first_position"] + at: whole[row["first_row"] + at] for at in range(row["rows"])
                }
    return torch.stack([found[position] for position in sorted(found)])


def test_they_are_those_of_whole_tensors(run: Run) -> None:
    for identity in run.requests:
        request = run.request(identity)
        for name in NAMES:
            expected = _by_steps(run, identity, f"{name}_cpu")
            assert torch.equal(request.tensor(f"{name}_cpu"), expected)
            assert torch.equal(request.tensor(f"{name}_cpu", dtype="float64"), expected.double())
            odd = request.positions(f"{name}_cpu")[1::2]
            if odd:
                assert torch.equal(request.rows_at(f"{name}_cpu", odd), expected[1::2])


def test_no_more_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url, identity = run.url, next(iter(run.requests))
    expected = run.request(identity).tensor(f"{NAMES[0]}_cpu")
    asked: list[int] = []
    for source in (PtSource, SegmentSource):
        read = source.read

        def noted(self: Any, record: Any, begin: int = 0, end: int | None = None, read: Any = read) -> Any:
            asked.append((record["bytes"] if end is None else end) - begin)
            return read(self, record, begin, end)

        monkeypatch.setattr(source, "read", noted)
        monkeypatch.setattr(source, "read_many", None)
    assert torch.equal(open_run(url).request(identity).tensor(f"{NAMES[0]}_cpu"), expected)
    # All of them, or none, where files are read together.
    assert sum(asked) in (0, expected.nbytes)


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_is_not_as_it_was_written_is_refused(cut: bool, tmp_path: Path) -> None:
    run = Served(seed=3).run(tmp_path, "pt")
    identity = next(iter(run.requests))
    file = Path(run.url) / f"step_{run.request(identity).steps[0]}" / f"{NAMES[0]}_cpu.pt"
    os.truncate(file, file.stat().st_size - 1) if cut else file.unlink()
    with pytest.raises(ReadError, match=f"{NAMES[0]}_cpu"):
        open_run(run.url).request(identity).tensor(f"{NAMES[0]}_cpu")


def test_no_step_of_others_is_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(run.url)
    assert list(opened.requests) == list(run.requests)
    steps: dict[str, list[int]] = {each: [] for each in run.requests}
    for number in run.steps:
        for row in run.step(number).rows or ():
            steps[row["request_id"]].append(number)
    asked: set[int] = set()
    document = Stored.document

    def noted(self: Stored, step: int, rank: int) -> Any:
        asked.add(step)
        return document(self, step, rank)

    monkeypatch.setattr(Stored, "document", noted)
    for identity, own in steps.items():
        asked.clear()
        assert opened.request(identity).steps == own and asked <= set(own)


def test_of_token_ids_that_make_no_sense_every_request_is_told(tmp_path: Path) -> None:
    run = Served(seed=3).run(tmp_path, "pt")
    last = Path(run.url) / f"step_{run.steps[-1]}" / "step.json"
    text = last.read_text()
    document = json.loads(text)
    for wrong in ([{"ids": [1]}], [1], {"request_id": "x"}):
        last.write_text(json.dumps({**document, "tokens": wrong}).replace(document["checksum"], ""))
        opened = open_run(run.url)
        assert list(opened.requests) == list(run.requests)
        with pytest.raises(ReadError, match="damaged tokens"):
            opened.request(next(iter(opened.requests)))
