"""Neuron's tensor capture, made by hand from its description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tlcore.errors import ReadError


class TestNeuronCapture(ForeignConformance):
    tool = "nxd-capture"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        listed = {}
        for name, tensor in tensors.items():
            # The dots are only in what lists the files.
            file = f"captured_tensors_cte_step_0_module_{name.replace('.', '_')}_output.pt"
            torch.save(tensor, directory / file)
            listed[file] = {"step": 0, "phase": "cte", "tensor_type": "output", "module_name": name}
        document = {"capture_session": {}, "tensors": listed}
        (directory / "capture_metadata.json").write_text(json.dumps(document))
        return directory


def _save(directory: Path, name: str, value: float) -> None:
    torch.save(torch.tensor([value]), directory / f"captured_tensors_{name}.pt")


def test_names_alone_tell_sides_and_phases(tmp_path: Path) -> None:
    _save(tmp_path, "cte_step_0_module_layers.0.mlp_output", 1)
    _save(tmp_path, "cte_step_0_module_layers.0.mlp_input", 0)
    _save(tmp_path, "cte_step_0_module_layers.0.attn_outputs_1", 2)
    _save(tmp_path, "cte_step_0_manual_tensor_3", 3)
    _save(tmp_path, "cte_step_0_module_input_layernorm_output", 6)
    _save(tmp_path, "cte_step_0_module_layers.9.attn.qkv.outputs", 7)
    _save(tmp_path, "tkg_step_1_module_layers.0.mlp_output", 4)
    run = tlcore.open_run(tmp_path)
    assert {name: each.item() for step in run.steps for name, each in run.step(step).items()} == {
        "step_0/input_layernorm/outputs_cpu": 6,
        "step_0/layers.0.attn/outputs_1_cpu": 2,
        "step_0/layers.0.mlp/inputs_0_cpu": 0,
        "step_0/layers.0.mlp/outputs_cpu": 1,
        "step_0/layers.9.attn.qkv/outputs_cpu": 7,
        "step_0/manual_tensor_3/outputs_cpu": 3,
        "step_1/layers.0.mlp/outputs_cpu": 4,
    }
    # Phases that count apart come one after the other.
    _save(tmp_path, "tkg_step_0_module_layers.0.mlp_output", 5)
    run = tlcore.open_run(tmp_path)
    assert [run.tensor(f"step_{step}/layers.0.mlp/outputs_cpu").item() for step in run.steps] == [1, 5, 4]


def test_what_is_listed_and_missing_is_counted(tmp_path: Path) -> None:
    _save(tmp_path, "cte_step_0_module_a_output", 1)
    told = {"module_name": "b.c", "tensor_shape": [2, 3], "tensor_dtype": "torch.bfloat16"}
    listed = {"captured_tensors_cte_step_0_module_b_c_output.pt": told}
    (tmp_path / "capture_metadata.json").write_text(json.dumps({"tensors": listed}))
    run = tlcore.open_run(tmp_path)
    assert run.ledger.to_json()["reasons"] == {"its file is missing": 1}
    assert run.step(0).call("b.c").outputs.shape == (2, 3)


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "capture_metadata.json").write_text("{}")
    with pytest.raises(ReadError, match=r"has capture_metadata\.json, but no captured_tensors_\*\.pt"):
        tlcore.open_run(tmp_path)
    _save(tmp_path, "cte_step_0_module_a_output", 1)
    with pytest.raises(ReadError, match=r"capture_metadata\.json: damaged, it lists no tensors"):
        tlcore.open_run(tmp_path).steps  # noqa: B018
    (tmp_path / "captured_tensors_cte_step_0_module_a_output.pt").write_bytes(b"x")
    with pytest.raises(ReadError, match=r"not a \.pt file"):
        tlcore.open_run(tmp_path)
