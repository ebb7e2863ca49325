"""The debugger of transformers writes, we read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlcore
from tests.backends.foreign.conformance import Emitting, ForeignConformance, Tensors
from tlcore.errors import ReadError

# Loading it takes seconds.
pytestmark = pytest.mark.slow


def debug(model: Any, path: Path, *args: Any, **keys: Any) -> None:
    from transformers import model_addition_debugger_context

    with model_addition_debugger_context(model, debug_path=str(path), use_repr=False, **keys):
        model(*args)


class TestTransformersDebugger(ForeignConformance):
    tool = "transformers-debugger"

    def write(self, directory: Path, tensors: Tensors) -> Path:
        debug(Emitting(tensors), directory, torch.zeros(1))
        return directory


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_a_model_is_the_same_as_captured_with_the_layers_that_the_tree_leaves_out(tmp_path: Path) -> None:
    model, tokens = _llama(), torch.arange(6)[None]
    with torch.no_grad(), tlcore.capture(model, output_dir=str(tmp_path / "runs")) as capture:
        model(tokens)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    debug(model, tmp_path / "dump", tokens)
    run = tlcore.open_run(tmp_path / "dump")
    found = tlcore.compare(capture.url, run, ignore_missing=True)
    first = found.first_difference
    assert first is not None and first.result.module == "model.layers.2.mlp.up_proj"
    layers = [
        record["module"].split(".")[2] for record in run.step(0).records if ".layers." in record["module"]
    ]
    assert layers == sorted(layers) and set(layers) == set("0123")
    one, other = (run.step(0).call(f"model.layers.{layer}").inputs for layer in (0, 1))
    assert list(one.kwargs) == list(other.kwargs)
    assert len(other.kwargs["position_embeddings"]) == 2


def test_what_a_later_call_overwrote_is_not_told_as_the_earlier_ones(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = torch.nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.m(self.m(x) + 1)
            return found

    debug(Twice(), tmp_path, torch.ones(2))
    run = tlcore.open_run(tmp_path)
    assert run.step(0).names == [
        "step_0/_root/inputs_0_cpu",
        "step_0/m_1/inputs_0_cpu",
        "step_0/m_1/outputs_cpu",
        "step_0/_root/outputs_cpu",
    ]
    assert run.tensor("step_0/m_1/outputs_cpu").tolist() == [2.0, 2.0]
    with pytest.raises(ReadError, match="overwritten by a later call"):
        run.tensor("step_0/m/outputs_cpu")


def test_printed_tensors_and_lone_summaries_say_so(tmp_path: Path) -> None:
    from transformers import model_addition_debugger_context

    with model_addition_debugger_context(torch.nn.Sequential(torch.nn.ReLU()), debug_path=str(tmp_path)) as _:
        pass
    model = torch.nn.Sequential(torch.nn.ReLU())
    with model_addition_debugger_context(model, debug_path=str(tmp_path)):
        model(torch.ones(2))
    run = tlcore.open_run(tmp_path)
    assert run.ledger.stored == 0
    with pytest.raises(ReadError, match="the debugger ran with use_repr=True"):
        run.tensor("step_0/0/outputs_cpu")
    (tmp_path / "Sequential_debug_tree_FULL_TENSORS.json").unlink()
    with pytest.raises(
        ReadError, match=r"has Sequential_debug_tree_SUMMARY\.json, but no \*_debug_tree_FULL"
    ):
        tlcore.open_run(tmp_path)


def test_files_of_two_forwards_are_not_mixed_silently(tmp_path: Path) -> None:
    debug(torch.nn.Sequential(torch.nn.ReLU()), tmp_path, torch.ones(2))
    tree = tmp_path / "Sequential_debug_tree_FULL_TENSORS.json"
    told = json.loads(tree.read_text())
    told["children"][0]["outputs"]["shape"] = "torch.Size([3])"
    tree.write_text(json.dumps(told))
    with pytest.raises(ReadError, match="files of several forwards are mixed"):
        tlcore.open_run(tmp_path).tensor("step_0/0/outputs_cpu")


class Layers(nn.Module):
    """Calls some layers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(self.norm(x))
        return found


def _layers(count: int, inner: Callable[[], nn.Module]) -> Layers:
    return Layers([Layer(inner()) for _ in range(count)])


class TwoStacks(nn.Module):
    """The debugger takes all their layers for one stack, of which it keeps the first and the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = _layers(4, nn.ReLU).layers
        self.second = _layers(3, lambda: _layers(3, nn.Tanh)).layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.first, *self.second):
            x = layer(x)
        return x


def test_layers_that_the_tree_leaves_out_come_where_they_were_called(tmp_path: Path) -> None:
    model, x = TwoStacks(), torch.randn(2, 4)
    with torch.no_grad(), tlcore.capture(model, output_dir=str(tmp_path / "runs")) as capture:
        model(x)
    with torch.no_grad():
        debug(model, tmp_path / "dump", x)
    captured, run = tlcore.open_run(capture.url), tlcore.open_run(tmp_path / "dump")
    names = run.step(0).names
    assert names == [name for name in captured.step(0).names if name in set(names)]
    assert len(names) == 79 and all(run.tensor(name).equal(captured.tensor(name)) for name in names)


def test_what_an_earlier_forward_left_is_not_told_as_the_last_ones(tmp_path: Path) -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Identity()

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            found: torch.Tensor = self.m(x)
            return found

    model = Masks()
    from transformers import model_addition_debugger_context

    with model_addition_debugger_context(model, debug_path=str(tmp_path), use_repr=False):
        model(torch.ones(2), mask=torch.ones(2))
        model(torch.zeros(2))
    run = tlcore.open_run(tmp_path)
    assert "step_0/_root/inputs_mask_cpu" not in run.step(0).names
    assert list(run.ledger.reasons) == [
        "left by an earlier forward: the tree of the last one does not name it"
    ]
    assert run.tensor("step_0/m/outputs_cpu").equal(torch.zeros(2)) and run.verify() == 4


def test_a_forward_that_raised_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        debug(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)), tmp_path, torch.ones(1, 2))
    with caplog.at_level(logging.WARNING, "tlcore"):
        tlcore.open_run(tmp_path)
    assert "of the transformers debugger, but no *_debug_tree_FULL_TENSORS.json" in caplog.text
    assert "that raised, or still runs" in caplog.text
