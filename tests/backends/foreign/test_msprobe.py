"""msprobe's dumps: made by hand, and by msprobe itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tlcore
from tests.backends.foreign.conformance import ForeignConformance, Tensors
from tests.backends.foreign.tools import installed, write
from tlcore.errors import ReadError

# What msprobe imports at once, without what those would bring.
PACKAGES = (
    "mindstudio-probe==26.2.0",
    "openpyxl",
    "et_xmlfile",
    "pytz",
    "tensorboard",
    "absl-py",
    "grpcio",
    "markdown",
    "protobuf",
    "werkzeug",
)
SCRIPT = """
import json, sys, torch
from torch import nn
folder, config, weights, level, fault = sys.argv[1:]
with open(config, "w") as file:
    json.dump({"task": "tensor", "dump_path": folder, "rank": [], "step": [], "level": level,
               "tensor": {"scope": [], "list": [], "data_mode": ["all"]}}, file)
from msprobe.pytorch import PrecisionDebugger
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, vocab_size=50, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1))
torch.save(model.state_dict(), weights)
if fault == "yes":
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
debugger = PrecisionDebugger(config_path=config)
for step in range(2):
    debugger.start(model=model)
    model(torch.arange(6)[None]).logits.sum().backward()
    debugger.stop()
    debugger.step()
"""


def _node(name: str, tensor: torch.Tensor, **more: Any) -> dict[str, Any]:
    told = {"type": "torch.Tensor", "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    return {**told, "data_name": f"{name}.pt", **more}


def _dump(place: Path, data: dict[str, Any], tensors: Tensors, **construct: str | None) -> None:
    (place / "dump_tensor_data").mkdir(parents=True)
    document = {"task": "tensor", "level": "L0", "framework": "pytorch", "data": data}
    (place / "dump.json").write_text(json.dumps(document))
    (place / "construct.json").write_text(json.dumps(construct))
    for name, tensor in tensors.items():
        torch.save(tensor, place / "dump_tensor_data" / f"{name}.pt")


class TestMsprobe(ForeignConformance):
    tool = "msprobe"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        named = {f"Module.{name}.Linear.forward.0": tensor for name, tensor in tensors.items()}
        files = {f"{name}.output.0": tensor for name, tensor in named.items()}
        data = {
            key: {"input_args": [], "input_kwargs": {}, "output": [_node(f"{key}.output.0", each)]}
            for key, each in named.items()
        }
        _dump(directory / "step0" / "rank0", data, files)
        return directory


@pytest.mark.slow
def test_what_msprobe_itself_writes_is_the_same_as_captured(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    packages = installed("msprobe", *PACKAGES)
    dumps = {}
    for level, fault in (("L0", "no"), ("L0", "yes"), ("mix", "no")):
        dumps[level, fault] = tmp_path / f"{level}-{fault}"
        write(
            packages,
            SCRIPT,
            *map(str, (dumps[level, fault], tmp_path / "config.json", tmp_path / "weights.pt", level, fault)),
        )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with tlcore.capture(model, output_dir=str(tmp_path / "runs"), log_step_ids=[0, 1]) as capture:
        for _ in range(2):
            model(torch.arange(6)[None])
    for dump in (dumps["L0", "no"], dumps["mix", "no"]):
        run = tlcore.open_run(dump)
        assert run.steps == [0, 1] and run.verify() == run.ledger.stored > 0
        found = tlcore.compare(capture.url, run, ignore_missing=True)
        assert found.equal and len(found.results) > 60, str(found)
    first = tlcore.compare(capture.url, dumps["L0", "yes"], ignore_missing=True).first_divergence
    assert first is not None and first.module == "model.layers.1.mlp.up_proj"
    names = tlcore.open_run(dumps["L0", "no"]).step(0).names
    sides = [name.rpartition("/")[2] for name in names if "/model.layers.0.mlp.down_proj/" in name]
    assert sides == ["inputs_0_cpu", "outputs_cpu", "grad_outputs_cpu", "grad_inputs_0_cpu"]
    assert "Functional.linear" in tlcore.open_run(dumps["mix", "no"]).step(0).calls


_ENDS = """
import os
from torch import nn
class Part(nn.Module):
    def forward(self, x, *, mask=None): return x * 2, [x + 1, None]
class Model(nn.Module):
    def __init__(self): super().__init__(); self.part, self.lin = Part(), nn.Linear(4, 4)
    def forward(self, x): return self.part(self.lin(self.lin(x)), mask=x > 0)[0]
torch.manual_seed(0)
model = Model()
debugger = PrecisionDebugger(config_path=config)
for step in range(2):
    debugger.start(model=model)
    model.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    if step: os._exit(0)
    debugger.stop()
    debugger.step()
"""


@pytest.mark.slow
def test_of_a_run_that_ended_before_its_step_did_the_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = SCRIPT.partition("from transformers")[0] + _ENDS
    package = installed("msprobe", *PACKAGES)
    write(package, script, str(tmp_path / "dump"), str(tmp_path / "config.json"), "", "L0", "")
    with caplog.at_level(logging.WARNING, "tlcore"):
        run = tlcore.open_run(tmp_path / "dump")
        whole, ended = run.step(0), run.step(1)
        assert {name.replace("step_1/", "step_0/") for name in ended.names} == set(whole.names)
    assert "dump.json does not list them" in caplog.text
    for name in ended.names:
        # Both steps are given the same.
        assert ended.tensor(name).equal(whole.tensor(name.replace("step_1/", "step_0/")))
    assert run.ledger.balanced and run.verify() == run.ledger.stored == 2 * len(whole.names) == 38
    half = next((tmp_path / "dump" / "step1").rglob("*.lin.*.forward.1.output.0.pt"))
    half.write_bytes(half.read_bytes()[:300])
    run = tlcore.open_run(tmp_path / "dump")
    assert list(run.ledger.reasons) == ["its file is damaged, or was not written to its end"]
    assert run.verify() == 2 * len(whole.names) - 1


def test_calls_gradients_and_parameters_are_told_apart(tmp_path: Path) -> None:
    x = torch.arange(4.0).view(2, 2)
    parts = ("m.input.0", "m.kwargs.k", "m.output.0", "m.output.1.a", "n.output.0", "w", "back.input", "g")
    tensors = {name: x + index for index, name in enumerate(parts)}
    node = {name: _node(name, tensor) for name, tensor in tensors.items()}
    data = {
        "Module.m.n.Linear.forward.1": {
            "input_args": [{"type": "int", "value": 3}],
            "output": [node["n.output.0"]],
            "parameters": {"weight": node["w"]},
        },
        "Module.m.Block.forward.0": {
            "input_args": [node["m.input.0"]],
            "input_kwargs": {"k": node["m.kwargs.k"]},
            "output": [node["m.output.0"], {"a": node["m.output.1.a"]}],
        },
        "Module.m.n.Linear.parameters_grad.0": {"weight": [node["g"]]},
        "Module.m.Block.backward.0": {"input": [node["back.input"]], "output": [None]},
    }
    _dump(tmp_path, data, tensors, **{"Module.m.n.Linear.forward.1": "Module.m.Block.forward.0"})
    step = tlcore.open_run(tmp_path).step(0)
    assert {name.removeprefix("step_0/"): int(each[0, 0]) for name, each in step.items()} == {
        "m/inputs_0_cpu": 0,
        "m/inputs_k_cpu": 1,
        "m.n_1/outputs_cpu": 4,
        "param.m.n.weight_1/outputs_cpu": 5,
        "m/outputs_0_cpu": 2,
        "m/outputs_1_a_cpu": 3,
        "param.m.n.weight/grad_outputs_cpu": 7,
        "m/grad_outputs_cpu": 6,
    }
    assert step.names[0] == "step_0/m/inputs_0_cpu"


def test_what_is_not_there_or_does_not_fit_is_said(tmp_path: Path) -> None:
    x = torch.ones(2)
    data = {
        "Module.a.L.forward.0": {"output": [{**_node("a", x), "data_name": None}]},
        "Module.b.L.forward.0": {"output": [_node("gone", x, Max=float("nan"), Min=-float("inf"))]},
        "Module.c.L.forward.0": {"output": [_node("c", torch.ones(3))]},
        "Module.d.L.forward.0": {"output": [_node("../../outside", x)]},
        "Module.e.L.forward.0": {"output": [{**_node("e", x), "data_name": "e.npy", "dtype": "Float32"}]},
    }
    torch.save(x, tmp_path / "outside.pt")
    place = tmp_path / "dump" / "step3" / "proc77"
    _dump(place, data, {"c": x})
    np.save(place / "dump_tensor_data" / "e.npy", x.numpy())
    run = tlcore.open_run(tmp_path / "dump")
    assert run.steps == [3]
    assert run.ledger.to_json()["reasons"] == {
        "only its statistics were dumped: task was not tensor": 1,
        "its file is missing": 2,
    }
    with pytest.raises(ReadError, match=r"c\.pt: holds float32 \[2\], dump\.json says float32 \[3\]"):
        run.tensor("step_3/c/outputs_cpu")
    assert run.tensor("step_3/e/outputs_cpu").equal(x)


def test_a_near_miss_says_what_is_missing(tmp_path: Path) -> None:
    _dump(tmp_path / "step0" / "rank0", {}, {})
    (tmp_path / "step0" / "rank0" / "stack.json").write_text("{}")
    (tmp_path / "step0" / "rank0" / "dump.json").rename(tmp_path / "dump.json")
    with pytest.raises(ReadError, match=r"has construct\.json, .* of msprobe, but no dump\.json"):
        tlcore.open_run(tmp_path / "step0" / "rank0")
    (tmp_path / "dump.json").write_text("[1]")
    with pytest.raises(ReadError, match=r"dump\.json: has no task, level and data"):
        tlcore.open_run(tmp_path)
    (tmp_path / "dump.json").unlink()
    for name in ("proc1", "proc2"):
        _dump(tmp_path / "step1" / name, {}, {})
    with pytest.raises(ReadError, match="holds several dumps of step 1"):
        tlcore.open_run(tmp_path)


def test_statistics_that_are_not_finite_are_no_damage(tmp_path: Path) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    told = {"Max": float("nan"), "Min": float("-inf"), "Norm": float("inf")}
    _dump(tmp_path, {"Module.a.L.forward.0": {"output": [_node("x", x, **told)]}}, {"x": x})
    step = tlcore.open_run(tmp_path).step(0)
    (name,) = step.names
    assert torch.equal(step.tensor(name).view(torch.int32), x.view(torch.int32))


def test_a_tree_that_leads_in_a_circle_or_never_ends_is_read_or_refused(tmp_path: Path) -> None:
    x = torch.ones(2)
    data: dict[str, Any] = {f"Module.{name}.L.forward.0": {"output": [_node("x", x)]} for name in "ab"}
    _dump(tmp_path / "a", data, {"x": x}, **dict(zip(data, reversed(data), strict=True)))
    assert len(tlcore.open_run(tmp_path / "a").step(0).names) == 2
    deep: Any = _node("x", x)
    for _ in range(200):
        deep = [deep]
    _dump(tmp_path / "b", {"Module.a.L.forward.0": {"output": [deep]}}, {"x": x})
    with pytest.raises(ReadError, match="nested too deep"):
        tlcore.open_run(tmp_path / "b").step(0).names  # noqa: B018


def test_a_step_whose_list_is_missing_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "step0" / "rank0"
    folder.mkdir(parents=True)
    (folder / "construct.json").write_text("{}")
    with pytest.raises(ReadError, match=r"has step0/rank0 of msprobe, but no dump\.json in it"):
        tlcore.open_run(tmp_path)


def test_of_statistics_alone_the_reason_is_told_where_values_are_needed(tmp_path: Path) -> None:
    data = {"Module.a.L.forward.0": {"output": [{**_node("a", torch.ones(2)), "data_name": None}]}}
    _dump(tmp_path, data, {})
    why = r"1 tensors were not stored \(1: only its statistics were dumped: task was not tensor\)"
    with pytest.raises(ReadError, match=f"no tensor to look at; its whole steps are 0; {why}"):
        tlcore.stats(tmp_path)
    with pytest.raises(ReadError, match="no tensor to compare; 2 tensors were not stored"):
        tlcore.compare(tmp_path, tmp_path)
