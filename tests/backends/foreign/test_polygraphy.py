"""Polygraphy's results of runners: made by hand, and saved by Polygraphy itself."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tests.backends.foreign.tools import installed, write
from tlcore.errors import ReadError

POLYGRAPHY = "polygraphy==0.53.6"
SCRIPT = """
import sys, numpy, torch
from safetensors.torch import load_file
from polygraphy.comparator import RunResults
from polygraphy.comparator.struct import IterationResult
results = RunResults()
for runner in ("onnxrt-runner-N0-01/31/26-10:20:30", "trt-runner-N0-01/31/26-10:20:31")[: int(sys.argv[3])]:
    iterations = []
    for step in range(2):
        outputs = {}
        for name, tensor in load_file(sys.argv[1]).items():
            fault = runner[0] == "t" and name == "/model/layers.1/mlp/Add_output_0"
            tensor = tensor + step + (1 if fault else 0)
            outputs[name] = tensor if tensor.dtype == torch.bfloat16 else numpy.asfortranarray(tensor.numpy())
        iterations.append(IterationResult(outputs, runtime=0.1, runner_name=runner))
    results.append((runner, iterations))
results.save(sys.argv[2])
"""


def _array(tensor: torch.Tensor) -> dict[str, Any]:
    buffer = io.BytesIO()
    if tensor.dtype == torch.bfloat16:
        torch.save(tensor, buffer)
        held = {"tensor": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "Tensor"}
    else:
        np.save(buffer, tensor.numpy())
        held = {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}
    return {"values": held, "polygraphy_class": "LazyArray"}


def _results(tensors: Tensors, cls: str = "RunResults") -> dict[str, Any]:
    outputs = {name: _array(tensor) for name, tensor in tensors.items()}
    iteration = {
        "outputs": outputs,
        "runtime": 0.1,
        "runner_name": "r",
        "polygraphy_class": "IterationResult",
    }
    return {"lst": [["r", [iteration]]], "polygraphy_class": cls}


class TestPolygraphy(ForeignConformance):
    tool = "polygraphy"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        (directory / "results.json").write_text(json.dumps(_results(tensors), indent=4))
        return directory


@pytest.mark.slow
def test_what_polygraphy_itself_saves_is_read_for_each_runner(tmp_path: Path) -> None:
    package = installed("polygraphy", POLYGRAPHY)
    tensors = {
        "/model/embed/Gather_output_0": torch.randn(3, 4),
        "/model/layers.0/mlp/Add_output_0": torch.randn(3, 4).half(),
        "/model/layers.1/mlp/Add_output_0": torch.randn(3, 4).bfloat16(),
        "ids": torch.arange(6).view(2, 3),
        "any" * 60: torch.ones(2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for runners in (1, 2):
        write(package, SCRIPT, *map(str, (tmp_path / "x.safetensors", tmp_path / f"{runners}.json", runners)))
    run = tlcore.open_run(tmp_path / "1.json")
    assert run.steps == [0, 1] and run.verify() == 10
    for name, tensor in tensors.items():
        (record,) = (each for each in run.step(1).records if each["module"] == name)
        assert run.tensor(record["name"]).equal(tensor + 1)
    both = tlcore.open_run(tmp_path / "2.json")
    assert both.verify() == 20
    found = tlcore.compare(run, both, maps=["^=trt-runner-N0."], ignore_missing=True).first_divergence
    assert found is not None and found.module == "trt-runner-N0./model/layers.1/mlp/Add_output_0"
    assert tlcore.compare(run, both, maps=["^=onnxrt-runner-N0."], ignore_missing=True).equal


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(_results({"m": torch.ones(2)})))
    with pytest.raises(ReadError, match=r"several results of Polygraphy \(a\.json, b\.json\)"):
        tlcore.open_run(tmp_path)
    assert tlcore.open_run(tmp_path / "a.json").steps == [0]
    (tmp_path / "b.json").unlink()
    (tmp_path / "a.json").write_text(json.dumps(_results({"m": torch.ones(2)}, "FormattedArray")))
    with pytest.raises(ReadError, match=r"a\.json: is FormattedArray of Polygraphy, not RunResults"):
        tlcore.open_run(tmp_path)
    old = {"lst": [], "polygraphy_serialized_json_type": "RunResults"}
    (tmp_path / "a.json").write_text(json.dumps(old))
    with pytest.raises(ReadError, match="load and save it with a newer one"):
        tlcore.open_run(tmp_path).steps  # noqa: B018


def test_outputs_of_any_name_keep_it(tmp_path: Path) -> None:
    names = ["12:34", "0:200", "a/b:0", "", "input", "x.output", "\u65e5\u672c", "\0", "any" * 60]
    tensors = {name: torch.full((3,), float(place)) for place, name in enumerate(names)}
    (tmp_path / "x.json").write_text(json.dumps(_results(tensors)))
    run = tlcore.open_run(tmp_path / "x.json")
    found = {each["module"]: run.tensor(each["name"])[0].item() for each in run.step(0).records}
    assert found == {name: place for place, name in enumerate(names)}


def test_hostile_results_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    sound = _results({"m": torch.ones(2)})
    outputs = sound["lst"][0][1][0]["outputs"]
    for text in (
        "0:99999999999999",
        "\0000:99999999999999",
        "\0009:1",
        "short",
        "A" * 201,
        "k05VTVBZAQB2AHsn" * 20,
    ):
        outputs["m"]["values"]["array"] = text
        file.write_text(json.dumps(sound))
        with pytest.raises(ReadError):
            tlcore.open_run(file).verify()
    deep = '{"lst": ' + "[" * 100_000 + "]" * 100_000 + ', "polygraphy_class": "RunResults"}'
    file.write_text(deep)
    with pytest.raises(ReadError, match="nested too deep"):
        tlcore.open_run(file).steps  # noqa: B018


def test_results_at_a_url_are_read_too(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://foreign-polygraphy/x.json", "wb") as target:
        target.write(json.dumps(_results({"m": torch.arange(50.0)})).encode())
    assert (
        tlcore.open_run("memory://foreign-polygraphy/x.json")
        .tensor("step_0/m/outputs")
        .equal(torch.arange(50.0))
    )
