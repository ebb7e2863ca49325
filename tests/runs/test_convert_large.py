"""Converting steps that are written whole: their structures are read while tensors are on their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.runs.test_convert import converted
from tlcore.__main__ import main
from tlcore.reader.stored import Stored
from tlcore.runs import conversion
from tlcore_backends.pt.one_step import _shares
from tlcore_backends.safetensors import segment_sink
from tlcore_backends.safetensors.moved_files import MovedFiles
from tlcore_backends.storage.uploads import Uploads

BACKENDS = {
    "pt": json.dumps({"name": "pt"}),
    "safetensors": json.dumps({"name": "safetensors", "segment_bytes": 100}),
}
WAYS = pytest.mark.parametrize(("own", "other"), [("pt", "safetensors"), ("safetensors", "pt")])


def _capture(output_dir: Path, backend: str) -> Path:
    """A run of two steps, neither of which is like the other."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    keys: dict[str, Any] = {"log_step_ids": [], "output_dir": str(output_dir), "backend": backend}
    with tlcore.capture(model, **keys) as captured:
        for rows in (3, 5):
            model(torch.randn(rows, 4))
    return Path(captured.url)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with steps, all of them large, in order: tensors sent on their way, structures read."""
    found: list[str] = []

    def noted(event: str, call: Any) -> Any:
        def noting(*args: Any) -> Any:
            found.append(event)
            return call(*args)

        return noting

    monkeypatch.setattr(segment_sink, "_LEAST_LARGE", 1)
    monkeypatch.setattr(conversion, "_LOCAL_BATCH_BYTES", 1)
    for kind, name, event in (
        (conversion._Steps, "_structures", "structures"),
        (MovedFiles, "_start", "tensors"),
        (Uploads, "start", "tensors"),
    ):
        monkeypatch.setattr(kind, name, noted(event, getattr(kind, name)))
    return found


@WAYS
def test_structures_are_read_while_tensors_are_on_their_way(
    tmp_path: Path, own: str, other: str, events: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = _capture(tmp_path / "a", own)
    there = converted(source, tmp_path / "b", BACKENDS[other], capsys)
    first, second = (index for index, event in enumerate(events) if event == "structures")
    assert events[:first] and events[first + 1 : second]
    old, new = tlcore.open_run(source), tlcore.open_run(there)
    assert new.verify() == old.verify()
    for number, step in old.items():
        assert new.step(number).structures(0) == step.structures(0)
        assert all(torch.equal(new.step(number)[name], step[name]) for name in step)


@WAYS
def test_wrong_structures_are_refused(
    tmp_path: Path,
    own: str,
    other: str,
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _capture(tmp_path / "a", own)
    problems = Stored.problems

    def wrong(self: Stored, step: int, rank: int, thorough: bool = True) -> Any:
        yield from problems(self, step, rank, thorough)
        if step == 1:
            yield "step_1: a structure was changed"

    if own == "pt":
        changed = source / "step_1/0/outputs.json"
        changed.write_text(changed.read_text().replace("outputs_cpu", "inputs_0_cpu"))
    else:
        # Those of a segment are in its index, all of which has a checksum.
        monkeypatch.setattr(Stored, "problems", wrong)
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", BACKENDS[other]]) == 2
    assert "step_1: a structure was changed" in capsys.readouterr().err
    there = tlcore.open_run(tmp_path / "b" / source.name)
    assert (there.state, there.steps) == ("incomplete", [0])
    assert not [*(tmp_path / "b").rglob("*.tmp")]


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ([5], [(0, 1)]),
        ([0, 0, 0], [(0, 1), (1, 3)]),
        ([1, 1, 1, 1], [(0, 2), (2, 4)]),
        ([1, 1, 9], [(0, 3)]),
        ([9, 1, 1], [(0, 1), (1, 3)]),
    ],
)
def test_two_threads_have_about_as_much_each(sizes: list[int], shares: list[tuple[int, int]]) -> None:
    assert list(_shares(sizes)) == shares
