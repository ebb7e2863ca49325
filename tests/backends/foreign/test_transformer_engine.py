"""TransformerEngine's dumps, made by hand from their description: the tool itself needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tlcore.errors import ReadError


def _save(place: Path, name: str, value: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    torch.save(value, place / f"{name}.pt")


class Quantized:
    """Stands for a tensor that only TransformerEngine can read."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


class TestTransformerEngine(ForeignConformance):
    tool = "transformer-engine"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        for name, tensor in tensors.items():
            place = directory / "tensor_dumps" / "rank_0" / "iter_000000"
            _save(place, f"{name}_output", {"high_precision": tensor})
        return directory


def test_tensors_of_a_layer_are_told_apart_and_what_is_quantized_is_counted(tmp_path: Path) -> None:
    place = tmp_path / "tensor_dumps" / "rank_0" / "iter_000100"
    layer = "decoder.layers.0.mlp.linear_fc1"
    kinds = ("activation", "weight", "gradient", "output", "wgrad", "dgrad")
    for value, kind in enumerate(kinds):
        held = {"high_precision": torch.tensor([value]), "quantized": Quantized(torch.ones(1))}
        _save(place, f"{layer}_{kind}", held)
    for path in (tmp_path, tmp_path / "tensor_dumps", tmp_path / "tensor_dumps" / "rank_0", place):
        run = tlcore.open_run(path)
        assert run.steps == [100]
        assert {name.removeprefix("step_100/"): each.item() for name, each in run.step(100).items()} == {
            f"{layer}/inputs_0_cpu": 0,
            f"param.{layer}.weight/outputs_cpu": 1,
            f"{layer}/grad_outputs_cpu": 2,
            f"{layer}/outputs_cpu": 3,
            f"param.{layer}.weight/grad_outputs_cpu": 4,
            f"{layer}/grad_inputs_0_cpu": 5,
        }
        assert run.ledger.to_json()["reasons"] == {"in a Quantized, which is not opened": 6}


def test_other_files_in_a_directory_of_an_iterations_name_are_read_as_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path / "iter_7", "x_output", torch.ones(1))
    assert tlcore.open_run(tmp_path / "iter_7").document["backend"] == "plain" and not caplog.text


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    place = tmp_path / "tensor_dumps"
    place.mkdir()
    with pytest.raises(ReadError, match="has tensor_dumps, but no rank_<r>/iter_<n> in it"):
        tlcore.open_run(tmp_path)
    (place / "rank_0" / "iter_000001").mkdir(parents=True)
    with pytest.raises(ReadError, match="has tensor_dumps/rank_0/iter_000001, but no tensor in it"):
        tlcore.open_run(tmp_path)
    _save(place / "rank_0" / "iter_000001", "x_output", torch.ones(1))
    with pytest.raises(ReadError, match="has neither high_precision nor quantized"):
        tlcore.open_run(tmp_path)
