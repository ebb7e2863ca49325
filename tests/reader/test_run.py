"""The reader on runs written by a real capture, whole, unfinished and damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tlcore
from tlcore.errors import BackendError, ReadError, VerifyError
from tlcore.ledger import Counts, Ledger
from tlcore.reader import Arguments, MissingError, Skipped, list_runs
from tlcore.reader.rebuild import rebuild, rebuild_arguments
from tlcore.record import Json, RunInfo, StepSummary
from tlcore.testing import RunWriter
from tlcore_backends.pt.sink import PtSink

Written = tuple[Path, list[torch.Tensor]]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Leaf(nn.Module):
    """Takes a keyword and returns a nest of containers."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None) -> Any:
        return {"pair": Pair(x * scale, x + 1), "list": [x.to(torch.bfloat16), None, "text", 3], "set": {1}}


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.leaf(x, scale=2.0)
        self.leaf(x, mask=x > 0)
        result: torch.Tensor = self.linear(out["pair"].first)
        return result


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A run of two steps, and the steps' inputs."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3) for _ in range(2)]
    with tlcore.capture(
        Root(), module_call_match=".", output_dir=str(tmp_path_factory.mktemp("out")), log_step_ids=[]
    ) as capture:
        model = capture._model
        for x in inputs:
            model(x)
    return Path(capture.url), inputs


@pytest.fixture
def copy(written: Written, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(written[0], tmp_path / "run"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_process_finds_a_run_again_wherever_it_was_looked_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    monkeypatch.chdir(copy.parent)
    for place in ("~/run", "run", copy):
        assert tlcore.open_run(place).opened_as == (str(copy), None)


def test_a_run_is_a_mapping_of_steps(written: Written) -> None:
    run = tlcore.open_run(written[0])
    assert (run.state, run.steps, run.incomplete_steps, len(run), list(run)) == (
        "complete",
        [0, 1],
        [],
        2,
        [0, 1],
    )
    assert run.id == written[0].name
    assert run.config["log_step_ids"] == []
    assert run.ledger.stored == run.ledger.captured == sum(len(step) for step in run.values())
    assert 7 not in run
    with pytest.raises(MissingError, match=r"no step 7; it has 0, 1"):
        run[7]


def test_a_step_is_a_mapping_of_tensors(written: Written) -> None:
    path, inputs = written
    for number, step in tlcore.open_run(path).items():
        assert step.calls == ["leaf", "leaf_1", "linear"]
        assert len(step) == len(step.names) == len(step.records)
        assert torch.equal(step[f"step_{number}/leaf/inputs_0_cpu"], inputs[number])
        assert torch.equal(step[f"step_{number}/leaf/outputs_pair_0_cpu"], inputs[number] * 2)
        assert all(tensor.device.type == "cpu" for tensor in step.values())
        assert f"step_{number}/leaf/inputs_1_cpu" not in step
        assert step.complete
        assert step.rows is None
        assert step.ledger.balanced


def test_tensors_and_json_are_found_by_logical_name(written: Written) -> None:
    run = tlcore.open_run(written[0])
    bf16 = run.tensor("step_0/leaf/outputs_list_0_cpu.pt")
    assert torch.equal(bf16, written[1][0].to(torch.bfloat16))
    assert run.json("step_0/linear/outputs.json")["type"] == "tensor"
    with pytest.raises(
        MissingError, match=r"no tensor 'step_0/linear/output_cpu'; did you mean '.*outputs_cpu'"
    ):
        run.tensor("step_0/linear/output_cpu")
    with pytest.raises(KeyError):
        run.tensor("linear")
    with pytest.raises(MissingError, match="no file"):
        run.json("step_0/linear/missing.json")


def test_a_call_is_rebuilt_with_its_tensors(written: Written) -> None:
    path, inputs = written
    step = tlcore.open_run(path).step(0)
    call = step.call("leaf")
    assert (call.module, call.index) == ("leaf", 0)
    assert torch.equal(call.inputs.args[0], inputs[0])
    assert call.inputs.kwargs == {"scale": 2.0}
    out = call.outputs
    assert torch.equal(out["pair"].first, inputs[0] * 2)
    assert torch.equal(out["pair"][1], inputs[0] + 1)
    assert out["list"][1:] == [None, "text", 3]
    assert out["set"] == [1]
    again = step.call("leaf_1")
    assert (again.module, again.index) == ("leaf", 1)
    assert torch.equal(again.inputs.kwargs["mask"], inputs[0] > 0)
    with pytest.raises(MissingError, match="not captured"):
        _ = call.post_fwd_inputs
    with pytest.raises(MissingError, match="did you mean 'linear'"):
        step.call("linaer")


def test_the_model_is_found_by_its_empty_name_and_a_later_call_is_no_rank(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    with tlcore.capture(model, output_dir=tmp_path) as captured:
        model(torch.ones(2))
    step = tlcore.open_run(captured.url).step(0)
    assert torch.equal(step.call("").outputs, torch.ones(2)) and step.call("").directory == "_root"
    with pytest.raises(MissingError, match=r"nothing of rank 1, only of \[0\] .* such as 0_1"):
        step.call("0", 1)
    with pytest.raises(MissingError, match="no call '0_1'; did you mean '0'"):
        step.call("0_1")


def test_a_skipped_tensor_is_told_from_a_stored_one(tmp_path: Path) -> None:
    with tlcore.capture(
        Root(), module_call_match=".", output_dir=str(tmp_path), max_tensor_size=1
    ) as capture:
        capture._model(torch.ones(2, 3))
    call = tlcore.open_run(capture.url).step(0).call("linear")
    assert isinstance(call.outputs, Skipped)
    assert call.outputs.shape == (2, 3)
    assert (call.module, call.index) == ("linear", 0)
    assert tlcore.open_run(capture.url).step(0).call("leaf_1").index == 1


def test_structures_of_every_kind_are_rebuilt() -> None:
    tensor = torch.ones(1)
    node: Json = {
        "type": "tuple",
        "items": [
            {"type": "float", "value": "nan"},
            {"type": "list", "items": [{"type": "bool", "value": True}]},
        ],
        "kwargs": {"type": "dict", "items": {"x": {"type": "tensor", "file": "f.pt"}}},
    }
    arguments = rebuild_arguments(node, lambda file: {"f.pt": tensor}[file])
    assert isinstance(arguments, Arguments)
    assert arguments.args[0] != arguments.args[0]
    assert arguments.args[1] == [True]
    assert arguments.kwargs["x"] is tensor
    for bad in ({"type": "pickle"}, {}, {"type": "dict", "items": []}, {"type": "list", "items": 3}):
        with pytest.raises(ReadError, match="not a tensor structure"):
            rebuild(bad, lambda file: tensor)


def test_verify_counts_every_tensor(written: Written) -> None:
    run = tlcore.open_run(written[0])
    assert run.verify() == run.ledger.stored


def test_verify_names_everything_that_is_damaged(copy: Path) -> None:
    data = bytearray((copy / "step_0/linear/outputs_cpu.pt").read_bytes())
    at = data.index(b"archive/data/0")
    payload = -(-(at + 18) // 64) * 64
    data[payload] ^= 1
    (copy / "step_0/linear/outputs_cpu.pt").unlink()
    (copy / "step_0/linear/outputs_cpu.pt").write_bytes(data)
    (copy / "step_1/linear/inputs_0_cpu.pt").unlink()
    short = copy / "step_1/linear/outputs_cpu.pt"
    cut = short.read_bytes()[:-200]
    short.unlink()
    short.write_bytes(cut)
    (copy / "step_1/leaf/outputs.json").write_text("{")
    (copy / "step_1/module_calls.txt").write_text("leaf\n")
    with pytest.raises(VerifyError) as caught:
        tlcore.open_run(copy).verify()
    shown = str(caught.value)
    # Of the structure it is told twice: the hash of all of them is another, too.
    assert len(caught.value.bad) == 6
    for name in (
        *("step_0/linear/outputs_cpu.pt", "step_1/linear/inputs_0_cpu.pt", "step_1/linear/outputs_cpu.pt"),
        *("step_1/leaf/outputs.json", "step_1/module_calls.txt"),
    ):
        assert name in shown


def test_an_unfinished_run_shows_what_is_whole(copy: Path) -> None:
    edit(copy / "run.json", state="running", closed=None)
    (copy / "step_1/step.json").unlink()
    (copy / "step_1/linear/outputs_cpu.pt.x-1.tmp").write_bytes(b"half")
    run = tlcore.open_run(copy)
    assert (run.state, run.steps, run.incomplete_steps) == ("incomplete", [0], [1])
    assert run.ledger.stored == len(run.step(0))
    step = run.step(1)
    assert not step.complete
    assert set(step.calls) == {"leaf", "leaf_1", "linear"}
    assert len(step) == len(run.step(0))
    assert step["step_1/linear/outputs_cpu"].shape == (2, 3)
    with pytest.raises(MissingError, match="not committed"):
        step.record("step_1/linear/outputs_cpu")
    with pytest.raises(MissingError, match=r"step 1 is incomplete; run.step\(1\) opens it"):
        run[1]
    assert run.verify() == run.ledger.stored


def write_rank(path: Path, rank: int, close: bool = True) -> None:
    """One committed step of a rank of two."""
    from tests.backends.pt.test_sink import make_record, make_run

    run: RunInfo = replace(make_run(path, rank, world_size=2), ledger=Ledger())
    sink = RunWriter(PtSink(), run=run, backend="pt")
    label = "" if rank == 0 else "_rank_1"
    name = f"step_0/a/outputs_cpu{label}"
    sink.write([make_record(name, torch.full((2,), float(rank)), rank)])
    node = {"type": "tensor", "shape": [2], "dtype": "torch.float32", "device": "cpu", "file": f"{name}.pt"}
    counts = Counts(captured=1, stored=1, bytes_captured=8, bytes_stored=8)
    calls = ["a", "b"] if rank else ["a"]
    sink.commit_step(
        StepSummary(0, rank, calls, {"a/outputs.json": node}, counts, "t0", "t1", rows=[{"r": rank}])
    )
    run.ledger.add(counts)
    if close:
        sink.close()


def test_ranks_are_merged(tmp_path: Path) -> None:
    write_rank(tmp_path / "run", 0)
    write_rank(tmp_path / "run", 1)
    run = tlcore.open_run(tmp_path / "run")
    assert (run.state, run.steps, run.world_size, run.ledger.stored) == ("complete", [0], 2, 2)
    step = run.step(0)
    assert (step.ranks, step.calls, step.rows, step.ledger.stored) == ([0, 1], ["a", "b"], [{"r": 0}], 2)
    assert [record["rank"] for record in step.records] == [0, 1]
    assert step.call("a").outputs.tolist() == [0.0, 0.0]
    assert step.call("a", rank=1).outputs.tolist() == [1.0, 1.0]
    assert run.verify() == 2


def test_a_rank_that_has_not_committed_or_closed_leaves_the_run_incomplete(tmp_path: Path) -> None:
    write_rank(tmp_path / "run", 0)
    run = tlcore.open_run(tmp_path / "run")
    assert (run.state, run.steps, run.incomplete_steps) == ("incomplete", [], [0])
    assert run.step(0)["step_0/a/outputs_cpu"].tolist() == [0.0, 0.0]
    write_rank(tmp_path / "run", 1, close=False)
    run = tlcore.open_run(tmp_path / "run")
    assert (run.state, run.steps, run.ledger.stored) == ("incomplete", [0], 2)


def test_wrong_paths_say_what_lies_there(written: Written, tmp_path: Path) -> None:
    path = written[0]
    with pytest.raises(ReadError, match=f"the newest is {path}"):
        tlcore.open_run(path.parent)
    with pytest.raises(ReadError, match=r"not a run \(it has no run.json\)"):
        tlcore.open_run(tmp_path)
    with pytest.raises(MissingError, match="there is no such directory"):
        tlcore.open_run(tmp_path / "missing")
    with pytest.raises(ReadError, match="is a file; give the run's directory"):
        tlcore.open_run(path / "run.json")
    with pytest.raises(ReadError, match=r"memory://nothing/run: not a run"):
        tlcore.open_run("memory://nothing/run")
    with pytest.raises(BackendError, match="unknown protocol 'nowhere'"):
        tlcore.open_run("nowhere://bucket/run")
    assert tlcore.open_run(f"file://{path}").verify()
    (tmp_path / "link").symlink_to(path)
    assert tlcore.open_run(tmp_path / "link").verify()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged, not JSON"),
        ("[]", "not written by tlcore"),
        ('{"layout": "1"}', "not written by tlcore"),
        ('{"layout": 3}', "layout version 3, this tlcore reads up to 2; a newer tlcore is needed"),
        ('{"layout": 1}', "'run_id' is missing"),
        ("[" * 100000, "damaged, not JSON"),
    ],
)
def test_a_foreign_or_damaged_run_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ReadError, match=message):
        tlcore.open_run(tmp_path)


def test_a_newer_or_damaged_step_is_named(copy: Path) -> None:
    edit(copy / "step_0/step.json", layout=9)
    edit(copy / "step_1/step.json", records=[{}])
    run = tlcore.open_run(copy)
    with pytest.raises(ReadError, match=r"step_0/step.json: has layout version 9"):
        _ = run.step(0).names
    with pytest.raises(ReadError, match="damaged record"):
        _ = run.step(1).names


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_not_executed(copy: Path, tmp_path: Path) -> None:
    target = copy / "step_0/linear/outputs_cpu.pt"
    target.unlink()
    torch.save(Bomb(tmp_path / "ran"), target)
    with pytest.raises(ReadError, match=r"not a readable \.pt file"):
        tlcore.open_run(copy).tensor("step_0/linear/outputs_cpu")
    assert not (tmp_path / "ran").exists()
    target.unlink()
    torch.save(OrderedDict(a=torch.ones(1)), target)
    with pytest.raises(ReadError, match="holds SETITEM, which no plain tensor needs"):
        tlcore.open_run(copy).tensor("step_0/linear/outputs_cpu")
    torch.save(torch.ones(9), target)
    with pytest.raises(ReadError, match=r"its step\.json says"):
        tlcore.open_run(copy).tensor("step_0/linear/outputs_cpu")


@pytest.mark.parametrize("file", ["../secret.pt", "/secret.pt", "step_0/../../secret.pt", "leak.pt"])
def test_nothing_outside_the_run_is_read(copy: Path, tmp_path: Path, file: str) -> None:
    torch.save(torch.zeros(2, 3), tmp_path / "secret.pt")
    (copy / "leak.pt").symlink_to(tmp_path / "secret.pt")
    document = json.loads((copy / "step_0/step.json").read_text())
    record = next(record for record in document["records"] if record["name"] == "step_0/linear/outputs_cpu")
    record["file"] = file
    (copy / "step_0/step.json").write_text(json.dumps(document))
    with pytest.raises(ReadError, match=r"not a valid name|leads out of"):
        tlcore.open_run(copy).tensor("step_0/linear/outputs_cpu")


def test_list_runs_is_ordered_and_shows_damaged_ones(written: Written, tmp_path: Path) -> None:
    for name, created in (("b", "2025-01-02"), ("a", "2025-01-03")):
        shutil.copytree(written[0], tmp_path / name)
        edit(tmp_path / name / "run.json", created=created, run_id=name)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/run.json").write_text("{")
    (tmp_path / "not-a-run").mkdir()
    runs = list_runs(tmp_path)
    assert [run.run_id for run in runs] == ["c", "b", "a"]
    assert "damaged, not JSON" in str(runs[0].problem)
    assert (runs[1].steps, runs[1].state, runs[1].problem) == (2, "complete", None)
    assert runs[1].tensors == tlcore.open_run(written[0]).ledger.stored
    assert runs[1].path == os.path.join(tmp_path, "b")
