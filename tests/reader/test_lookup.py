"""Tensors found without their device's name, and what is said of those that were not stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.ranked import ranks_run
from tests.reading import command
from tests.toys import model
from tlcore.errors import ReadError
from tlcore.reader import MissingError, Run
from tlcore.testing import RunWriter, make_record, make_summary
from tlcore_backends.pt.sink import PtSink
from tlcore_backends.safetensors.sink import SafetensorsSink

SINKS: dict[str, Any] = {"pt": PtSink, "safetensors": SafetensorsSink}


def run_with(place: Path, stems: list[str], backend: str = "pt") -> Run:
    """A run whose one call has an output of each name, filled with its position."""
    records = [
        make_record(f"step_0/m/{stem}", torch.full((2,), float(value))) for value, stem in enumerate(stems)
    ]
    sink = RunWriter(SINKS[backend](), place / "run", backend)
    sink.write(records)
    sink.commit_step(make_summary(0, records))
    sink.close()
    return tlcore.open_run(place / "run")


def captured(place: Path, module: nn.Module, **keys: Any) -> Run:
    with tlcore.capture(module, output_dir=str(place), **keys) as capture:
        module(torch.randn(2, 4))
    return tlcore.open_run(capture.url)


@pytest.mark.parametrize("backend", SINKS)
@pytest.mark.parametrize("device", ["cpu", "cuda_0", "xpu_0", "cuda_3_rank_0", "cpu_rank_1"])
def test_the_device_may_be_left_out(tmp_path: Path, backend: str, device: str) -> None:
    run = run_with(tmp_path, [f"outputs_{device}", f"outputs_key_{device}", f"outputs_0_{device}"], backend)
    for value, short in enumerate(["outputs", "outputs_key", "outputs_0"]):
        name = f"step_0/m/{short}"
        if device == "cpu_rank_1":
            with pytest.raises(MissingError, match=f"did you mean .*'{name}_cpu_rank_1'"):
                run.tensor(name)
            continue
        step = run.step(0)
        for found in (run.tensor(name), run.tensor(f"{name}.pt"), step.tensor(name), step[name]):
            assert found.tolist() == [value, value]
        assert step.find(name) == step.record(name)["name"] == f"{name}_{device}"
        # A mapping's own keys are the full names.
        assert name not in step


def test_an_exact_name_wins(tmp_path: Path) -> None:
    step = run_with(tmp_path, ["outputs_a", "outputs_a_cpu", "outputs_cpu"]).step(0)
    assert step["step_0/m/outputs_a"].tolist() == [0, 0]
    assert step["step_0/m/outputs_cpu"].tolist() == [2, 2]


def test_several_or_none_are_named(tmp_path: Path) -> None:
    run = run_with(tmp_path, ["outputs_a_b_cpu", "outputs_a_b_cpu~2", "outputs_0_cpu", "outputs_1_cpu"])
    with pytest.raises(MissingError) as caught:
        run.tensor("step_0/m/outputs_a_b")
    hint = "did you mean 'step_0/m/outputs_a_b_cpu' or 'step_0/m/outputs_a_b_cpu~2'?"
    assert str(caught.value).endswith(f"no tensor 'step_0/m/outputs_a_b'; {hint}")
    with pytest.raises(MissingError, match=r"'step_0/m/outputs_[01]_cpu' or 'step_0/m/outputs_[01]_cpu'"):
        run.tensor("step_0/m/outputs")


def test_of_several_ranks_it_is_the_first_one_s(tmp_path: Path) -> None:
    on_cpu = ranks_run(tmp_path, [{"norm": torch.zeros(2)}, {"norm": torch.ones(2)}], {})
    assert on_cpu.tensor("step_0/norm/outputs").tolist() == [0, 0]
    on_gpu = run_with(tmp_path, ["outputs_cuda_1", "outputs_cuda_0"])
    assert on_gpu.tensor("step_0/m/outputs").tolist() == [1, 1]


def test_an_uncommitted_tensor_is_found_as_well(tmp_path: Path) -> None:
    run = run_with(tmp_path, ["outputs_cpu"])
    (tmp_path / "run/step_0/step.json").unlink()
    assert tlcore.open_run(run.url).tensor("step_0/m/outputs").tolist() == [0, 0]
    with pytest.raises(MissingError, match="'step_0/m/outputs_cpu' has no record"):
        tlcore.open_run(run.url).step(0).record("step_0/m/outputs")


@pytest.mark.parametrize("backend", SINKS)
def test_statistics_without_the_tensor(tmp_path: Path, backend: str) -> None:
    run = captured(tmp_path, model(), capture="stats", backend=backend)
    full = "step_0/1/inputs_0_cpu"
    for name in (full, f"{full}.pt", "step_0/1/inputs_0"):
        with pytest.raises(MissingError) as caught:
            run.tensor(name)
        why = f"only its statistics were kept (statistics only); run.stats({full!r}) has them"
        assert str(caught.value) == f"{run.url}: {full!r} was not stored, {why}"
        assert run.stats(name) == run.stats(full)
        status, text = command("show", run.url, name)
        assert status == 0 and f"{run.stats(full).mean:.6g}" in text
        assert "not stored (statistics only), only its statistics were kept" in text
    shown = json.loads(command("show", run.url, "step_0/1/inputs_0", "--json")[1])
    assert (shown["name"], shown["shape"], shown["hash"]) == (full, [2, 4], run.stats(full).hash)
    with pytest.raises(MissingError, match="no tensor 'step_0/1/inputs_9'"):
        run.tensor("step_0/1/inputs_9")


@pytest.mark.parametrize("backend", SINKS)
def test_a_skipped_tensor_has_its_reason(tmp_path: Path, backend: str) -> None:
    run = captured(tmp_path, model(), max_tensor_size=4, backend=backend)
    for name in ("step_0/0/outputs_cpu", "step_0/0/outputs"):
        expected = r"'step_0/0/outputs_cpu' was not stored \(larger than max_tensor_size\)"
        with pytest.raises(MissingError, match=expected):
            run.tensor(name)
        status, text = command("show", run.url, name)
        assert status == 2 and "larger than max_tensor_size" in text
    assert run.tensor("step_0/2/outputs").shape == (2, 2)
    assert run.step(0).unstored("step_0/2/outputs") is None
    assert run.step(0).unstored("step_1/0/outputs") is None


def test_a_rank_s_own_tensors_have_their_reason(tmp_path: Path) -> None:
    run = captured(tmp_path, model(), max_tensor_size=4)
    document = json.loads((Path(run.url) / "step_0/0/outputs.json").read_text())
    (Path(run.url) / "step_0/0/outputs_rank_1.json").write_text(json.dumps(document))
    with pytest.raises(MissingError, match=r"'step_0/0/outputs_cpu_rank_1' was not stored"):
        tlcore.open_run(run.url).tensor("step_0/0/outputs_cpu_rank_1")


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    run = captured(tmp_path, model(), capture="stats")
    file = Path(run.url) / "step_0/0/outputs.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "stats": {**document["stats"], "mean": "\x1b[2J"}}))
    with pytest.raises(ReadError, match=r"outputs\.json: damaged statistics"):
        tlcore.open_run(run.url).tensor("step_0/0/outputs")


@pytest.mark.parametrize("backend", SINKS)
def test_show_prints_one_structure(tmp_path: Path, backend: str) -> None:
    run = captured(tmp_path, model(), backend=backend)
    status, text = command("show", run.url, "step_0/2/inputs.json")
    assert status == 0
    assert text == "inputs: tuple\n  0: torch.float32 [2, 4] cpu  step_0/2/inputs_0_cpu.pt\n"
    status, text = command("show", run.url, "2/outputs.json", "--json")
    assert (status, json.loads(text)) == (0, run.json("step_0/2/outputs.json"))
    status, text = command("show", run.url, "step_0/2/output.json")
    assert status == 2 and "no file 'step_0/2/output.json'" in text
    assert command("show", run.url, "step_0/../../outside.json")[0] == 2
    assert command("show", run.url, "step_0/step.json")[0] == 2
