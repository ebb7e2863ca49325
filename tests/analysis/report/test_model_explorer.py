"""The overlay for Model Explorer: each call's worst error and colour, and the graph that it is for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tlcore
from tests.compat.environments import consumer
from tests.engine.samples import forward, llama, padded
from tlcore.__main__ import main
from tlcore.analysis.report.model_explorer import GRAPH, graph, node_data

SCRIPT = Path(__file__).with_name("model_explorer_script.py")


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = []
    for epsilon in (1e-6, 1e-2):
        model = llama()
        model.model.layers[1].input_layernorm.variance_epsilon = epsilon
        found.append(forward(model, tmp_path_factory.mktemp("runs"), padded([[5, 6, 7]])).url)
    return found


def test_nodes_have_the_worst_error_and_edges_what_flows(urls: list[str]) -> None:
    comparison = tlcore.compare(*urls)
    results = json.loads(node_data(comparison))[GRAPH]["results"]
    nodes: dict[str, Any] = {each["id"]: each for each in json.loads(graph(comparison))["graphs"][0]["nodes"]}
    assert results.keys() == nodes.keys()
    assert results["model.layers.0"] == {"value": 0.0, "bgColor": "#e8f0f8", "textColor": "#1c2430"}
    worst = max(
        each.measures.rel_l2 or 0.0
        for each in comparison.results
        if each.module == "model.layers.1.mlp" and each.measures is not None
    )
    assert results["model.layers.1.mlp"]["value"] == pytest.approx(worst) and worst > 0
    # A module that contains others is a layer, in which its own call stands.
    assert nodes["model.layers.1.mlp"]["namespace"] == "model/layers/1/mlp"
    assert nodes["model.layers.1.mlp.up_proj"]["namespace"] == "model/layers/1/mlp"
    sources = [edge["sourceNodeId"] for edge in nodes["model.layers.1"]["incomingEdges"]]
    assert "model.layers.0" in sources
    assert "NaN" not in node_data(comparison) + graph(comparison)


def test_the_graph_lies_beside_the_overlay(urls: list[str], tmp_path: Path) -> None:
    words = ["--format", "model-explorer", "--output", str(tmp_path / "overlay.json")]
    assert main(["compare", *urls, *words]) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["overlay.graph.json", "overlay.json"]


@pytest.mark.slow
@pytest.mark.deep
def test_model_explorer_takes_the_overlay_and_its_graph(tmp_path: Path) -> None:
    urls = []
    for value in (0.0, torch.nan):
        model = llama(num_hidden_layers=4)
        model.model.layers[2].mlp.down_proj.weight.data[0] += value
        urls.append(forward(model, tmp_path / "runs", padded([[5, 6, 7]])).url)
    overlay = tmp_path / "overlay.json"
    assert main(["compare", *urls, "--format", "model-explorer", "--output", str(overlay)]) == 1
    command = [str(consumer("model-explorer")), str(SCRIPT), str(overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("REPORT ")[1])
    assert found["same"] == [True, True] and found["unknown"] == []
    assert found["values"]["model.layers.1.mlp"] < found["values"]["model.layers.2.mlp.down_proj"] == 1e4
    assert found["namespaces"]["model.layers.2.mlp"] == "model/layers/2/mlp"
    assert found["sources"]["model.layers.3"] == ["model.layers.2", "model.rotary_emb"]
    assert found["served"] == [True, True]
