"""Runs that earlier versions wrote are read as they were then.

``layout_1.tar.xz`` holds runs of both formats, each with every kind of thing that a run can have: many
dtypes, aliases, two ranks, statistics, tensors that were too large, a process that died between its
tensors and its ``step.json``. ``told.json`` in it is what the version that wrote them read back.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import xxhash

import tlcore

ARCHIVE = Path(__file__).parents[1] / "data" / "layout_1.tar.xz"
RUNS = [
    f"{backend}/{kind}" for backend in ("pt", "safetensors") for kind in ("ranks", "statistics", "crashed")
]


def told(path: str) -> dict[str, Any]:
    """All that `tlcore.open_run` and the ``tlcore://`` tree say of the run at ``path``."""
    run = tlcore.open_run(path)
    tree = fsspec.filesystem("tlcore", run=path, skip_instance_cache=True)
    return {
        "state": run.state,
        "id": run.id,
        "steps": run.steps,
        "incomplete_steps": run.incomplete_steps,
        "ledger": run.ledger.to_json(),
        "sound": run.verify(),
        "step": {str(number): _step(run, number) for number in [*run.steps, *run.incomplete_steps]},
        "tree": {name: _digest(tree.cat_file(name)) for name in sorted(tree.find(""))},
    }


def _step(run: Any, number: int) -> dict[str, Any]:
    step = run.step(number)
    return {
        "calls": step.calls,
        "tensors": {name: _tensor(step.tensor(name)) for name in step.names},
        "aliases": {each["name"]: each["alias_of"] for each in step.records if "alias_of" in each},
        "rows": step.rows,
        "structures": {
            f"{rank} {name}": _digest(json.dumps(value, sort_keys=True).encode())
            for rank in step.ranks
            for name, value in step.structures(rank).items()
        },
        "statistics": {
            each["name"]: _digest(json.dumps(each["stats"], sort_keys=True).encode())
            for each in step.described
        },
    }


def _tensor(tensor: torch.Tensor) -> list[Any]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), _digest(data)]


def _digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layout_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_layout_1_tells_what_it_told_then(runs: Path, name: str) -> None:
    expected = json.loads((runs / "told.json").read_text())[name]
    found = told(str(runs / name))
    for key in expected:
        assert found[key] == expected[key], key


@pytest.mark.parametrize("kind", ["ranks", "statistics"])
def test_both_formats_told_the_same(runs: Path, kind: str) -> None:
    every = json.loads((runs / "told.json").read_text())
    one, other = every[f"pt/{kind}"], every[f"safetensors/{kind}"]
    assert one["step"] == other["step"]
    assert one["ledger"] == other["ledger"]
