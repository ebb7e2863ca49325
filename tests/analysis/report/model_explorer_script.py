"""Reads an overlay and its graph as Model Explorer's own classes, and has its configuration load both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dacite import Config, from_dict  # type: ignore[import-not-found]
from model_explorer import config  # type: ignore[import-not-found]
from model_explorer.graph_builder import GraphCollection  # type: ignore[import-not-found]
from model_explorer.node_data_builder import GraphNodeData, ModelNodeData  # type: ignore[import-not-found]
from model_explorer.utils import convert_adapter_response, remove_none  # type: ignore[import-not-found]


def main(overlay: str) -> None:
    file = Path(overlay)
    graph_file = file.with_suffix(".graph.json")
    data, graphs = (json.loads(each.read_text()) for each in (file, graph_file))
    strict: Any = Config(strict=True)
    node_data = ModelNodeData({name: from_dict(GraphNodeData, each, strict) for name, each in data.items()})
    collection = from_dict(GraphCollection, graphs, strict)
    again = json.loads(json.dumps(convert_adapter_response({"graphCollections": [collection]})))
    (graph,) = collection.graphs
    shown = config().add_model_from_path(str(graph_file)).add_node_data_from_path(str(file))
    sources = {node.id: [edge.sourceNodeId for edge in node.incomingEdges] for node in graph.nodes}
    ids = {node.id for node in graph.nodes}
    results = node_data.graphsData[graph.id].results
    report = {
        "same": [
            _with(json.loads(node_data.to_json_string()), data),
            _with(again["graphCollections"][0], graphs),
        ],
        "unknown": sorted({*results} - ids | {each for given in sources.values() for each in given} - ids),
        "values": {name: each.value for name, each in results.items()},
        "namespaces": {node.id: node.namespace for node in graph.nodes},
        "sources": sources,
        "served": [len(shown.model_sources) == 1, len(shown.node_data_sources) == 1],
    }
    print("REPORT " + json.dumps(remove_none(report)))  # noqa: T201  # what the test waits for


def _with(found: Any, given: Any) -> bool:
    """Whether all that was given is in what was found, which has defaults beside it."""
    if isinstance(given, dict):
        return all(key in found and _with(found[key], each) for key, each in given.items())
    if isinstance(given, list):
        return len(found) == len(given) and all(map(_with, found, given))
    return bool(found == given)


main(sys.argv[1])
