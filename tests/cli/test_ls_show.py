"""`tlcore ls` and `tlcore show` on a captured run, for people and for programs."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcore
from tests.ranked import ranks_run
from tlcore.__main__ import main
from tlcore.cli.tables import printable, size
from tlcore.statistics.stored import summarize


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two steps of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    out = str(tmp_path_factory.mktemp("out"))
    with tlcore.capture(model, module_call_match=".", output_dir=out, log_step_ids=[]) as capture:
        for _ in range(2):
            model(torch.randn(3, 4))
    return Path(capture.url)


def output(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """What a command that must succeed prints."""
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_ls_of_an_output_dir_lists_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, row = output(capsys, "ls", run.parent).splitlines()
    assert header.split() == ["run", "state", "created", "steps", "tensors", "bytes"]
    assert row.split()[:2] == [run.name, "complete"]
    assert row.split()[3:5] == ["2", "12"]
    listed = json.loads(output(capsys, "ls", run.parent, "--json"))["runs"]
    assert [(entry["run_id"], entry["steps"], entry["tensors"]) for entry in listed] == [(run.name, 2, 12)]


def test_ls_of_an_empty_directory_and_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "ls", tmp_path) == "no runs\n"
    assert main(["ls", str(tmp_path / "missing")]) == 2
    assert "there is no such directory" in capsys.readouterr().err


def test_ls_of_a_run_lists_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "ls", run).splitlines()
    assert lines[0].startswith(f"run {run.name}  complete")
    assert lines[2].split()[:4] == ["0", "complete", "3", "6"]
    assert "6 captured, 6 stored" in lines[2]
    document = json.loads(output(capsys, "ls", run, "--json"))
    assert [step["tensors"] for step in document["steps"]] == [6, 6]
    assert document["run"]["ledger"]["stored"] == 12


def test_ls_of_a_step_lists_calls_and_tensors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "ls", run, "--step", "1", "--module", "^1$").splitlines()
    assert lines[2].split()[:5] == ["1", "1", "inputs_0_cpu", "float32", "3x4"]
    assert lines[2].endswith("same as 0/outputs_cpu")
    assert len(lines) == 4
    document = json.loads(output(capsys, "ls", run, "--module", "0|2", "--json"))
    assert [call["call"] for call in document["steps"][0]["call_list"]] == ["0", "2"]
    assert document["steps"][1]["call_list"][0]["records"][0]["shape"] == [3, 4]


def test_ls_refuses_what_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--step", "9"), "no step 9; it has 0, 1"),
        (("--module", "("), "'(' is not a regular expression"),
    ):
        assert main(["ls", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_ls_says_which_step_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tlcore.capture(nn.Sequential(nn.ReLU()), module_call_match=".", output_dir=str(tmp_path)) as capture:
        capture._model(torch.ones(1))
    Path(capture.url, "step_0/step.json").unlink()
    assert "incomplete" in output(capsys, "ls", capture.url)
    assert "not committed" in output(capsys, "ls", capture.url, "--step", "0")
    assert "not committed" in output(capsys, "show", capture.url, "0/outputs_cpu")


def test_show_of_a_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = tlcore.open_run(run).tensor("step_1/2/outputs_cpu")
    for name in ("step_1/2/outputs_cpu", "step_1/2/outputs_cpu.pt"):
        text = output(capsys, "show", run, name)
        assert str(tensor) in text
        assert "(3, 2)" in text
        assert "float32" in text
        assert f"{tensor.double().mean():.6g}" in text
    document = json.loads(output(capsys, "show", run, "step_1/2/outputs_cpu", "--json"))
    assert document["l2"] == pytest.approx(float(tensor.double().norm()))
    assert document["std"] == pytest.approx(float(tensor.double().std(correction=0)))
    assert (
        json.loads(output(capsys, "show", run, "2/outputs_cpu", "--json"))["name"] == "step_0/2/outputs_cpu"
    )
    assert main(["show", str(run), "step_0/2/output_cpu"]) == 2
    assert "did you mean 'step_0/2/outputs_cpu'" in capsys.readouterr().err


def test_show_of_a_call(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", run, "step_0/2")
    assert text.splitlines() == [
        "2, call 0 of step 0",
        "inputs: tuple",
        "  0: torch.float32 [3, 4] cpu  step_0/2/inputs_0_cpu.pt",
        "outputs: torch.float32 [3, 2] cpu  step_0/2/outputs_cpu.pt",
    ]
    document = json.loads(output(capsys, "show", run, "step_0/2", "--json"))
    assert document["outputs"]["shape"] == [3, 2]


def test_a_terminal_gets_a_drawn_table(run: Path) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "tlcore", "ls", str(run)]
    subprocess.run(
        command, stdout=child, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}, timeout=120
    )
    os.close(child)
    shown = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert "┃" in shown
    assert "complete" in shown


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool, torch.uint8],
    ids=str,
)
def test_statistics_are_those_of_the_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [3, 0]]).to(dtype)
    exact = tensor.to(torch.float64)
    found = summarize(tensor)
    assert (found.min, found.max, found.zeros, found.nans, found.infs) == (0, float(exact.max()), 2, 0, 0)
    assert found.mean == pytest.approx(float(exact.mean()))
    assert found.std == pytest.approx(float(exact.std(correction=0)))
    assert found.l2 == pytest.approx(float(exact.norm()))


def test_statistics_of_unusual_tensors() -> None:
    found = summarize(torch.tensor([math.nan, math.inf, -math.inf, 2.0, 0.0]))
    assert (found.min, found.max, found.mean, found.nans, found.infs, found.zeros) == (0, 2, 1, 1, 2, 1)
    empty = summarize(torch.empty(0, 3))
    assert (empty.min, empty.std, empty.zeros) == (None, None, 0)
    assert summarize(torch.tensor(3 + 4j)).max == 5
    large = torch.full(((1 << 22) + 5,), 1e6)
    large[0] += 1
    assert summarize(large).std == pytest.approx(float(large.double().std(correction=0)), rel=1e-6)


def test_names_and_sizes_are_fit_to_print() -> None:
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert [size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_ranks_and_their_parts_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [{"a_proj": torch.ones(1, 2)}, {"a_proj": torch.zeros(1, 2)}]
    url = ranks_run(tmp_path, tensors, {"a_proj": {"outputs": {"0": {"dim": -1}}}}).url
    assert main(["ls", url, "--step", "0"]) == 0
    shown = capsys.readouterr().out
    assert "2 ranks (tensor parallel 2)" in shown
    assert "part 1 of 2 (dim -1)" in shown and "part 2 of 2 (dim -1)" in shown
    assert main(["ls", url, "--json"]) == 0
    assert [place["tp_rank"] for place in json.loads(capsys.readouterr().out)["run"]["ranks"]] == [0, 1]
    assert main(["show", url, "a_proj/outputs_0_cpu_rank_1", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["rank"], described["part"]["tp_size"]) == (1, 2)


def test_parts_that_cannot_be_joined_are_shown_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"unknown": "tokens of several replicas"}
    url = ranks_run(tmp_path, [{"a_proj": torch.ones(1, 2)}] * 2, {"a_proj": {"inputs": {"*": part}}}).url
    assert main(["ls", url, "--step", "0"]) == 0
    shown = capsys.readouterr().out
    assert "rank 0's own (tokens of several replicas)" in shown and "rank 1's own" in shown
    assert main(["show", url, "a_proj/inputs_0_cpu"]) == 0
