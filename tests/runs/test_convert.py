"""Converting a run: lossless, byte for byte the same after going there and back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tlcore.__main__ import main
from tlcore.registry import open_store
from tlcore.testing import RunWriter, every_dtype, make_record, make_run, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.sink import SafetensorsSink

_fresh = itertools.count()


def files(place: str | Path) -> dict[str, bytes]:
    """Every file of a run, whole."""
    store = open_store(place)
    return {entry.name: store.get(entry.name) for entry in store.list()}


def capture(output_dir: Path, backend: Any) -> Path:
    """A run with two steps of a model that calls one module twice and passes keywords on."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.Tensor(self.relu(self.relu(input=self.linear(x)).to(torch.bfloat16)))

    model = Model()
    keys: dict[str, Any] = {"log_step_ids": [], "log_post_fwd_inputs": True}
    with tlcore.capture(model, output_dir=str(output_dir), backend=backend, **keys) as capture:
        for _ in range(2):
            model(torch.randn(3, 4))
    return Path(capture.url)


def two_ranks(url: Path, kind: type[PtSink] | type[SafetensorsSink]) -> Path:
    """A run of two ranks with every dtype, an alias, rows and a further key in ``step.json``."""
    for rank in (1, 0):
        label = "" if rank == 0 else "_rank_1"
        records = [make_record(f"step_0/{n}/outputs_cpu{label}", t, rank) for n, t in every_dtype().items()]
        first = records[0]
        records.append(make_record(f"step_0/z/outputs_cpu{label}", first.tensor(), rank, alias_of=first.name))
        name = "pt" if kind is PtSink else "safetensors"
        sink = RunWriter(kind(), run=make_run(url, rank, world_size=2, run_id=url.name), backend=name)
        sink.write(records)
        sink.commit_step(make_summary(0, records, rank, rows=[{"request_id": "r"}], note=0.1))
        sink.close()
    return url


def converted(
    source: Path | str, target: Path | str, backend: str, capsys: pytest.CaptureFixture[str]
) -> str:
    assert main(["convert", str(source), str(target), "--backend", backend]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(("own", "other"), [("pt", "safetensors"), ("safetensors", "pt")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_there_and_back_gives_the_same_bytes(
    tmp_path: Path, own: str, other: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: dict[str, type[PtSink] | type[SafetensorsSink]] = {"pt": PtSink, "safetensors": SafetensorsSink}
    source = capture(tmp_path / "a", own) if ranks == 1 else two_ranks(tmp_path / "a" / "run-1", kinds[own])
    there = converted(source, tmp_path / "b", other, capsys)
    assert Path(there) == tmp_path / "b" / source.name
    before, after = tlcore.open_run(source), tlcore.open_run(there)
    assert json.loads(files(there)["run.json"])["backend"] == other
    assert after.verify() == before.verify()
    assert (after.ledger, after.state) == (before.ledger, "complete")
    back = converted(there, tmp_path / "c", own, capsys)
    if own == "pt":
        assert files(back) == files(source)
    else:
        # Where segments end depends on time; what is in them does not.
        assert files(converted(back, tmp_path / "d", "pt", capsys)) == files(there)


def test_through_object_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    parent = f"memory://convert-{next(_fresh)}"
    there = converted(source, parent, '{"name": "fsspec", "format": "safetensors"}', capsys)
    assert there == f"{parent}/{source.name}"
    plain = converted(there, f"{parent}/tree", "pt", capsys)
    assert files(plain) == files(source)
    assert files(converted(plain, tmp_path / "b", "pt", capsys)) == files(source)


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    before = files(source)
    assert main(["convert", str(source), str(tmp_path / "a"), "--backend", "safetensors"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "safetensor"]) == 2
    assert "no backend 'safetensor'" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "tests.sinks:MemorySink"]) == 2
    assert "has no reader" in capsys.readouterr().err
    assert files(source) == before
    document = json.loads(before["run.json"])
    (source / "run.json").write_text(json.dumps({**document, "state": "running"}))
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "pt"]) == 2
    assert "not complete" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_damage_is_found_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = capture(tmp_path / "a", "pt")
    torch.save(torch.zeros(3, 4), source / "step_1/linear/outputs_cpu.pt")
    assert main(["convert", str(source), str(tmp_path / "b"), "--backend", "safetensors"]) == 2
    assert "step_1/linear/outputs_cpu" in capsys.readouterr().err
    assert tlcore.open_run(tmp_path / "b" / source.name).state == "incomplete"
