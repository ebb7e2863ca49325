"""Long runs in segments are looked at by whole arrays; what is said of them is what is said step by step."""

from __future__ import annotations

import gc
import json
import os
import pickle
import threading
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.hotpath import reading
from tlcore.reader.lasting import lasting_objects
from tlcore.statistics.stored import summarize_pieces, summarize_rows
from tlcore_backends.safetensors import segment_files

BACKENDS: dict[str, Any] = {
    "segments": {"name": "safetensors"},
    "shards": {"name": "safetensors", "layout": 1},
    "pt": {"name": "pt"},
}
STEPS = 40


class Layer(nn.Module):
    def forward(self, x: torch.Tensor, scale: float, flag: bool = True) -> dict[str, torch.Tensor]:
        return {"wide": x * scale, "few": (x[:, :3] > 0), "narrow": x.bfloat16()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, scale + number, flag=number > 0)["wide"]
        return x


def captured(directory: Path, backend: str, shift: float = 0.0) -> tlcore.Run:
    """A run whose steps have different numbers of rows, some NaN, and values of their own."""
    model, generator = Model(), torch.Generator().manual_seed(0)
    with tlcore.capture(
        model, output_dir=str(directory / backend), log_step_ids=[], backend=BACKENDS[backend]
    ) as capture:
        for step in range(STEPS):
            x = torch.randn(2 + step % 3, 16, generator=generator)
            if step == 7:
                x[0, 3] = torch.nan
            if step % 10 == 9:
                x[1, 1] += shift
            model(x, 1.0 + (shift if step == 12 else 0.0))
    return tlcore.open_run(capture.url)


def said(document: dict[str, Any]) -> str:
    """What a report says, but for where the runs lie."""
    return json.dumps({key: value for key, value in document.items() if key not in ("a", "b", "run")})


def test_reports_are_those_of_the_same_steps_one_by_one(tmp_path: Path) -> None:
    runs = {name: captured(tmp_path, name) for name in BACKENDS}
    others = {name: captured(tmp_path / "other", name, shift=0.25) for name in BACKENDS}
    surveys = {said(tlcore.stats(run).to_json()) for run in runs.values()}
    assert len(surveys) == 1 and '"nans": 1' in next(iter(surveys))
    equal = {said(tlcore.compare(run, run.url, deep=True).to_json()) for run in runs.values()}
    assert len(equal) == 1
    settled = {said(tlcore.compare(run, run.url).to_json()) for run in runs.values()}
    assert len(settled) == 1
    differing = [tlcore.compare(runs[name], others[name]).to_json() for name in runs]
    assert len(set(map(said, differing))) == 1
    assert differing[0]["counts"]["different"] > 0 and "values that are no tensors" in str(
        differing[0]["notes"]
    )


def test_structures_are_made_when_somebody_looks(tmp_path: Path) -> None:
    run, again = captured(tmp_path, "segments"), captured(tmp_path / "again", "segments")
    steps = [each.step(number) for each in (run, again) for number in each.steps]
    assert tlcore.compare(run, again).equal
    structures = [step.documents[0]["structures"] for step in steps]
    # What the dictionary holds by itself, whatever it shows.
    assert all(set(dict.values(each)) == {None} for each in structures)
    assert structures[3] == structures[STEPS + 3]
    assert set(dict.values(structures[3])) == {None}
    assert structures[3] != structures[4] and structures[3] != structures[STEPS + 5]
    plain = {name: run.json(f"step_3/{name}") for name in structures[3]}
    for shown in (
        dict(structures[STEPS + 3]),
        json.loads(json.dumps(structures[23])),
        pickle.loads(pickle.dumps(structures[13])),
        {**structures[33]},
        structures[STEPS + 23].copy(),
        {} | structures[STEPS + 13],
        structures[STEPS + 33] | {},
    ):
        assert shown.keys() == plain.keys() and None not in shown.values()
    assert dict(structures[STEPS + 3]) == plain == structures[3]
    assert structures[5].get("nothing") is None and structures[5].get("_root/inputs.json")["type"] == "tuple"


def test_the_rows_of_an_array_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = captured(tmp_path, "segments"), captured(tmp_path / "other", "segments", shift=0.25)
    arrays = sum(1 for _ in run.stored.arrays(0))
    reads: list[int] = []

    def counted(handle: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return os.pread(handle, size, offset)

    def counted_into(handle: int, memory: list[memoryview], offset: int) -> int:
        reads.append(memory[0].nbytes)
        return os.preadv(handle, memory, offset)

    counting = type("Counting", (), {"pread": counted, "preadv": counted_into, "fstat": os.fstat})
    monkeypatch.setattr(segment_files, "os", counting)
    # Without the C extension some are read here.
    monkeypatch.setattr(reading, "os", counting)
    tlcore.stats(run)
    assert 0 < len(reads) <= arrays
    # Hashes settle most steps; of those between which others lie, all the same.
    for deep in (False, True):
        reads.clear()
        assert not tlcore.compare(run, other, deep=deep).equal
        # Those of the first tensors that differ are read again, for their details.
        assert 0 < len(reads) <= 2 * arrays + 2 * 21
    reads.clear()
    assert tlcore.compare(run, run.url).equal and not reads


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("size", [1, 7, 64, 129, 1000, 8192])
def test_statistics_of_rows_are_those_of_each_bit_by_bit(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    count = min(16, (1 << 14) // size)
    rows = (100 * torch.randn(count, size, generator=generator, dtype=torch.float64)).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        rows[0, 0], rows[-1] = torch.nan, torch.inf
        rows[1, size // 2] = -0.0
    found = summarize_rows(rows)
    assert [repr(astuple(each)) for each in found] == [
        repr(astuple(summarize_pieces([row.clone()]))) for row in rows
    ]


def test_the_collector_of_garbage_is_as_it_was() -> None:
    before = gc.get_threshold()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lasting_objects():
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=hold)
    with lasting_objects():
        assert gc.get_threshold()[:2] == before[:2] and gc.get_threshold()[2] >= 1000
        thread.start()
        assert inside.wait(10)
    assert gc.get_threshold()[2] >= 1000
    leave.set()
    thread.join(10)
    assert gc.get_threshold() == before
    with lasting_objects():
        gc.set_threshold(*before[:2], 11)
    assert gc.get_threshold()[2] == 11
    gc.set_threshold(*before)
