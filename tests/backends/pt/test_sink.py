"""The ``pt`` sink: the documented tree, whole steps, safe reuse of a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import tlcore_backends.pt.sink
from tlcore.errors import BackendError
from tlcore.ledger import Counts, Ledger
from tlcore.protocols import Sink
from tlcore.record import Json, Origin, Record, RunInfo, StepSummary
from tlcore.registry import open_store
from tlcore.testing import RunWriter
from tlcore_backends.pt.sink import PtSink


def make_run(path: Path, rank: int = 0, world_size: int = 1, run_id: str = "run-1") -> RunInfo:
    """A run at ``path`` with a short document."""
    document: Json = {"layout": 1, "run_id": run_id, "created": "2025-01-01T00:00:00+00:00"}
    document |= {
        "host": "h",
        "pid": 1,
        "world_size": world_size,
        "config": {},
        "backend": "pt",
        "versions": {},
    }
    return RunInfo(run_id, str(path), rank, world_size, document, Ledger())


def make_record(name: str, tensor: torch.Tensor, rank: int = 0, alias_of: str | None = None) -> Record:
    """A record with the bytes of ``tensor``."""
    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    step, module = int(name.split("/")[0].removeprefix("step_")), name.split("/")[1]
    digest = xxhash.xxh3_128_hexdigest(data)
    shape = tuple(tensor.shape)
    origin = Origin(rank, module, 0, "outputs", (), tensor.dtype, shape, "cpu")
    return Record(name, step, origin, data, digest, alias_of)


def make_summary(
    step: int, calls: Sequence[str], structures: Mapping[str, Json], rank: int = 0, **extra: Any
) -> StepSummary:
    """A step's summary with fixed times."""
    return StepSummary(step, rank, calls, structures, Counts(captured=2, stored=2), "t0", "t1", **extra)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def test_the_sink_fulfils_the_protocol() -> None:
    assert isinstance(PtSink(), Sink)


def test_a_run_has_the_documented_tree(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sink, tensor = RunWriter(PtSink(), run=run), torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert read(tmp_path / "run/run.json")["state"] == "running"
    first = make_record("step_0/a/outputs_cpu", tensor)
    again = make_record("step_0/b/inputs_0_cpu", tensor, alias_of=first.name)
    sink.write([first])
    sink.write([again])
    node = {"type": "tensor", "file": "step_0/a/outputs_cpu.pt"}
    assert not (tmp_path / "run/step_0/step.json").exists()
    rows = [{"request_id": "r"}]
    sink.commit_step(make_summary(0, ["a", "b"], {"a/outputs.json": node}, rows=rows, extra={"note": 1}))
    run.ledger.add(Counts(captured=2, stored=2))
    sink.close()

    files = {str(p.relative_to(tmp_path / "run")) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        *("run.json", "step_0/step.json", "step_0/module_calls.txt", "step_0/a/outputs.json"),
        *("step_0/a/outputs_cpu.pt", "step_0/b/inputs_0_cpu.pt"),
    }
    assert (tmp_path / "run/step_0/module_calls.txt").read_text() == "a\nb\n"
    assert read(tmp_path / "run/step_0/a/outputs.json") == node
    loaded = torch.load(tmp_path / "run/step_0/b/inputs_0_cpu.pt", weights_only=True)
    assert torch.equal(loaded, tensor)
    assert loaded.dtype == torch.bfloat16
    assert os.path.samefile(
        tmp_path / "run/step_0/a/outputs_cpu.pt", tmp_path / "run/step_0/b/inputs_0_cpu.pt"
    )

    step = read(tmp_path / "run/step_0/step.json")
    assert (step["layout"], step["calls"], step["rows"], step["note"]) == (1, ["a", "b"], rows, 1)
    size = (tmp_path / "run/step_0/a/outputs_cpu.pt").stat().st_size
    assert step["records"] == [
        {**first.describe(), "file": "step_0/a/outputs_cpu.pt", "file_bytes": size},
        {**again.describe(), "file": "step_0/b/inputs_0_cpu.pt", "file_bytes": size},
    ]
    document = read(tmp_path / "run/run.json")
    assert document["state"] == "complete"
    assert document["closed"]
    assert document["ledger"]["stored"] == 2
    assert (tmp_path / "run/run.json").read_bytes().endswith(b"}\n")


def test_further_ranks_write_their_own_files(tmp_path: Path) -> None:
    for rank in (1, 0):
        sink = RunWriter(PtSink(), run=make_run(tmp_path / "run", rank, world_size=2), backend="pt")
        label = "" if rank == 0 else "_rank_1"
        sink.write([make_record(f"step_0/a/outputs_cpu{label}", torch.ones(2), rank)])
        sink.commit_step(make_summary(0, ["a"], {"a/outputs.json": {"type": "none"}}, rank))
        sink.close()
    names = {path.name for path in tmp_path.rglob("*.*")}
    assert names == {
        *("run.json", "close_rank_1.json", "module_calls.txt", "module_calls_rank_1.txt"),
        *("step.json", "step_rank_1.json", "outputs.json", "outputs_rank_1.json"),
        *("outputs_cpu.pt", "outputs_cpu_rank_1.pt"),
    }
    assert read(tmp_path / "run/close_rank_1.json")["rank"] == 1


def test_an_abandoned_step_leaves_no_trace_in_the_next(tmp_path: Path) -> None:
    sink = RunWriter(PtSink(), run=make_run(tmp_path / "run"), backend="pt")
    sink.write([make_record("step_0/a/outputs_cpu", torch.ones(2))])
    sink.write([make_record("step_1/a/outputs_cpu", torch.ones(2))])
    sink.commit_step(make_summary(1, ["a"], {}))
    sink.commit_step(make_summary(2, [], {}))
    assert not (tmp_path / "run/step_0/step.json").exists()
    assert len(read(tmp_path / "run/step_1/step.json")["records"]) == 1
    assert read(tmp_path / "run/step_2/step.json")["records"] == []


def test_an_alias_of_a_record_that_was_not_stored_stands_for_itself(tmp_path: Path) -> None:
    sink = RunWriter(PtSink(), run=make_run(tmp_path / "run"), backend="pt")
    sink.write([make_record("step_0/a/outputs_cpu", torch.ones(2), alias_of="step_0/lost/outputs_cpu")])
    sink.commit_step(make_summary(0, ["a"], {}))
    assert "alias_of" not in read(tmp_path / "run/step_0/step.json")["records"][0]
    assert torch.equal(torch.load(tmp_path / "run/step_0/a/outputs_cpu.pt"), torch.ones(2))


def test_what_another_rank_has_written_is_accepted_and_what_the_same_has_is_not(tmp_path: Path) -> None:
    RunWriter(PtSink(), run=make_run(tmp_path / "run", rank=1, world_size=2))
    RunWriter(PtSink(), run=make_run(tmp_path / "run"))
    RunWriter(PtSink(), run=make_run(tmp_path / "run", rank=1, world_size=2))
    with pytest.raises(BackendError, match="already holds run 'run-1'"):
        RunWriter(PtSink(), run=make_run(tmp_path / "run"))


def test_the_directory_of_another_run_or_of_no_run_is_refused(tmp_path: Path) -> None:
    RunWriter(PtSink(), run=make_run(tmp_path / "run"))
    with pytest.raises(BackendError, match="already holds run 'run-1'"):
        RunWriter(PtSink(), run=make_run(tmp_path / "run", run_id="run-2"))
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home/thesis.tex").write_text("")
    with pytest.raises(BackendError, match=r"holds 'thesis.tex' and no run.json"):
        RunWriter(PtSink(), run=make_run(tmp_path / "home"))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=f"{tmp_path}/file/run"):
        RunWriter(PtSink(), run=make_run(tmp_path / "file" / "run"))


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for place in ("one", "two"):
        sink = RunWriter(PtSink(), run=make_run(tmp_path / place), backend="pt")
        sink.write([make_record("step_0/a/outputs_cpu", torch.arange(5.0))])
        sink.commit_step(make_summary(0, ["a"], {"a/outputs.json": {"type": "str", "value": "\ud800"}}))
        files = sorted((tmp_path / place).rglob("*.*"))
        contents.append({str(f.relative_to(tmp_path / place)): f.read_bytes() for f in files if f.is_file()})
    assert contents[0] == contents[1]


def test_little_is_remembered_of_large_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlcore_backends.pt.sink, "_MOST_TENSORS", 50)
    sink = PtSink()
    writer = RunWriter(sink, run=make_run(tmp_path / "run"), backend="pt")
    remembered = []
    for step, count in enumerate((30, 10, 30, 60, 5)):
        names = (f"step_{step}/m/outputs_{number}_cpu" for number in range(count))
        writer.write([make_record(name, torch.ones(1)) for name in names])
        writer.commit_step(make_summary(step, ["m"], {}))
        remembered.append(list(sink._written))
    assert remembered == [[0], [0, 1], [1, 2], [], [4]]
    writer.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_several_ranks_capture_none_publishes_whole_directories(tmp_path: Path, ranks: int) -> None:
    sink = PtSink()
    sink.open(replace(make_run(tmp_path, world_size=ranks), store=open_store(str(tmp_path))))
    assert sink.alike_in_capture is (ranks == 1)
    sink.close()
