"""Exports are what other packages read: each in an environment of its own, by its own classes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.compat.environments import CONSUMERS, consumer
from tests.engine.samples import generated, llama
from tlcore.runs.export.export import export

pytestmark = [pytest.mark.slow, pytest.mark.deep]
pytest.importorskip("pyarrow")

SCRIPTS = Path(__file__).parent / "consumers"
LAYERS = [f"model.layers.{layer}/outputs" for layer in range(4)]
CONTEXT = 4


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation of 40 requests, in every format: all layers as requests, one as the others."""
    target = tmp_path_factory.mktemp("exports")
    ids = torch.arange(3, 43)[:, None] + torch.arange(5)
    # Tokens that end or pad would be nobody's.
    options = {"eos_token_id": None, "suppress_tokens": [0, 1]}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = llama(num_hidden_layers=4)
    run = generated(model, target / "runs", batch, new=9, options=options, backend="safetensors")
    export(run, target / "requests", "requests", LAYERS)
    for format, context in (("hf", None), ("arrow", CONTEXT), ("parquet", None)):
        export(run, target / format, format, LAYERS[-1:], context=context)
    return target


@pytest.fixture(scope="module")
def rows(exports: Path) -> Mapping[str, torch.Tensor]:
    """What was captured of the last layer, by request."""
    (url,) = (exports / "runs").iterdir()
    data = tlcore.open_run(url).dataset(LAYERS[-1], per="request")
    return {data.requests[int(item["request"])]: item[LAYERS[-1]] for item in data}


def said(package: str, script: str, *words: object) -> Any:
    """What a script prints in the environment of a package."""
    command = [str(consumer(package)), str(SCRIPTS / script), *map(str, words)]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path(str(words[0])) / "cache"),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=environment, cwd="/"
    )
    for line in done.stdout.splitlines():
        if line.startswith("REPORT "):
            return json.loads(line.removeprefix("REPORT "))
    raise AssertionError(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def test_speculators_reads_requests_and_trains_a_draft_model(exports: Path) -> None:
    found = said("speculators", "speculators_script.py", exports / "requests", 32, len(LAYERS))
    assert found["samples"] == 40 and found["shape"] == [13, 96]
    assert found["loss_mask"] == [0] * 5 + [1] * 8
    assert found["losses"][-1] < found["losses"][0]


def test_datasets_and_pandas_open_every_format(exports: Path, rows: Mapping[str, torch.Tensor]) -> None:
    found = said("speculators", "datasets_script.py", exports, LAYERS[-1])
    total = sum(float(each.double().sum()) for each in rows.values())
    whole = sum(float(each[: len(each) // CONTEXT * CONTEXT].double().sum()) for each in rows.values())
    assert found["hf"][:2] == [40, pytest.approx(total)] and len(found["hf"][2]) == 13
    assert found["arrow"] == [40 * (13 // CONTEXT), pytest.approx(whole), [CONTEXT, 32]]
    assert found["parquet"][:2] == [40 * 13, pytest.approx(total)] and found["requests"] == 40
    assert found["parquet"][2] == ["request_id", "position", "token_id", "response", LAYERS[-1]]


def test_sae_lens_takes_cached_activations(exports: Path, rows: Mapping[str, torch.Tensor]) -> None:
    found = said("sae-lens", "sae_lens_script.py", exports / "arrow", LAYERS[-1], CONTEXT, 32)
    known = {tuple(row) for each in rows.values() for row in each.tolist()}
    assert len(found["rows"]) == 16 and all(tuple(row) in known for row in found["rows"])


def test_there_is_an_environment_for_each_package() -> None:
    assert CONSUMERS.keys() == {"speculators", "sae-lens", "model-explorer"}
