"""TransformerEngine's dumps, made by hand from their description: the tool itself needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tlcore.errors import ReadError
from tlcore_backends.foreign.dotted_names import dotted


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
            _save(place, f"{name.replace('.', '_')}_output", {"high_precision": tensor})
        return directory


def test_tensors_of_a_layer_are_told_apart_and_what_is_quantized_is_counted(tmp_path: Path) -> None:
    place = tmp_path / "tensor_dumps" / "rank_0" / "iter_000100"
    layer = "decoder.layers.0.mlp.linear_fc1"
    kinds = ("activation", "weight", "gradient", "output", "wgrad", "dgrad")
    for value, kind in enumerate(kinds):
        held = {"high_precision": torch.tensor([value]), "quantized": Quantized(torch.ones(1))}
        _save(place, f"{layer.replace('.', '_')}_{kind}", held)
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


def test_iterations_of_one_directory_are_told_apart_by_their_files_names(tmp_path: Path) -> None:
    for rank in range(2):
        place = tmp_path / "tensor_dumps" / f"rank_{rank}"
        for iteration in (0, 100):
            for kind in ("activation", "weight"):
                name = f"decoder_layers_{rank}_mlp_linear_fc1_{kind}_iter_{iteration:06d}"
                _save(place, name, {"high_precision": torch.tensor([rank + iteration])})
    run = tlcore.open_run(tmp_path)
    assert run.steps == [0, 100]
    assert {name: each.item() for name, each in run.step(100).items()} == {
        "step_100/decoder.layers.0.mlp.linear_fc1/inputs_0_cpu": 100,
        "step_100/param.decoder.layers.0.mlp.linear_fc1.weight/outputs_cpu": 100,
        "step_100/decoder.layers.1.mlp.linear_fc1/inputs_0_cpu_rank_1": 101,
        "step_100/param.decoder.layers.1.mlp.linear_fc1.weight/outputs_cpu_rank_1": 101,
    }
    assert tlcore.open_run(tmp_path / "tensor_dumps" / "rank_1").steps == [0, 100]
    # Files of such a name may be anybody's.
    _save(tmp_path / "other", "x_iter_1", {"weights": torch.ones(1)})
    assert tlcore.open_run(tmp_path / "other").document["backend"] == "plain"


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.11.self_attention.linear_qkv",
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2",
        "decoder.layers.0.pre_mlp_layernorm",
        "model.layers.3.self_attn.q_proj",
        "language_model.encoder.layers.0.self_attention.layernorm_qkv",
        "my_tower.layers.2.odd_proj",
        "fc1",
        "text_model",
        "module.module.embedding.word_embeddings",
        "with__two",
        "transformer.h.5.attn",
    ],
)
def test_dots_of_layers_names_are_found_again(name: str) -> None:
    assert dotted(name.replace(".", "_")) == name and dotted(name) == name


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
