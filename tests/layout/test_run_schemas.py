"""A real run's run.json and step.json fit the schemas that describe them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

import tlcore
import tlcore_schemas
from tlcore.__main__ import main
from tlcore.config.configuration import load_config
from tlcore.runs.convert import convert

RUN, STEP = tlcore_schemas.load("run.v1"), tlcore_schemas.load("step.v1")
SHARED: Registry[Any] = Registry().with_resource("run.v1.json", Resource.from_contents(RUN))


def capture_run(output_dir: Path, backend: str = "pt", capture: str = "tensor") -> Path:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Identity())
    with tlcore.capture(model, output_dir=output_dir, backend=backend, capture=capture) as captured:
        model(torch.ones(2, 3))
    return Path(captured.url)


def test_run_json_fits_its_schema(tmp_path: Path) -> None:
    document = json.loads((capture_run(tmp_path) / "run.json").read_text())
    Draft202012Validator(RUN).validate(document)
    assert document["state"] == "complete"
    # Only vLLM has ranks with places, only a run with `inject` was injected, and nothing is missing here.
    assert set(document) == set(RUN["properties"]) - {"ranks", "injected", "remarks"}
    assert document["config"]["output_dir"] == str(tmp_path)


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_a_run_says_what_is_not_in_it(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.used(x)

    model = Model()
    with tlcore.capture(model, output_dir=tmp_path, backend=backend) as captured:
        model(torch.ones(1, 2))
    run = tlcore.open_run(captured.url)
    Draft202012Validator(RUN).validate(run.document)
    assert (
        run.remarks
        == captured.remarks
        == ["selected, but never called: unused: the model's own code passed them by"]
    )
    assert main(["ls", captured.url]) == 0
    assert "remark: selected, but never called: unused" in capsys.readouterr().out
    other = "pt" if backend == "safetensors" else "safetensors"
    converted = convert(run, load_config({"output_dir": str(tmp_path / "other"), "backend": other}))
    assert tlcore.open_run(converted).remarks == run.remarks


@pytest.mark.parametrize("backend", ["pt", "safetensors"])
def test_step_json_fits_its_schema_and_has_no_key_beyond_it(tmp_path: Path, backend: str) -> None:
    document = tlcore.open_run(capture_run(tmp_path, backend)).json("step_0/step.json")
    Draft202012Validator(STEP, registry=SHARED).validate(document)
    assert set(document) <= set(STEP["properties"])
    assert document["records"]
    record_keys = set(STEP["$defs"]["record"]["properties"])
    assert all(set(record) <= record_keys for record in document["records"])


@pytest.mark.parametrize("capture", ["stats", "both"])
def test_statistics_fit_the_schema(tmp_path: Path, capture: str) -> None:
    document = tlcore.open_run(capture_run(tmp_path, "safetensors", capture)).json("step_0/step.json")
    validator = Draft202012Validator(STEP, registry=SHARED)
    validator.validate(document)
    stats = document["structures"]["0/outputs.json"]["stats"]
    assert set(stats) == set(STEP["$defs"]["stats"]["properties"])
    stats["zeros"] = -1
    assert not validator.is_valid(document)


def test_the_schema_refuses_a_step_that_lacks_what_a_reader_needs(tmp_path: Path) -> None:
    document = json.loads((capture_run(tmp_path) / "step_0" / "step.json").read_text())
    validator = Draft202012Validator(STEP, registry=SHARED)
    del document["records"][0]["hash"]
    document["ledger"]["stored"] = -1
    assert {error.json_path for error in validator.iter_errors(document)} == {
        "$.records[0]",
        "$.ledger.stored",
    }
