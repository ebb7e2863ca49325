"""A comparison for Google's Model Explorer: the graph of what was captured, and its colours as node data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ...layout.names import call_name
from ..results import Comparison, TensorResult
from .module_tree import size_of

# Both documents speak of one graph, by its name.
GRAPH = "tlcore"
# A size that is none has the colour of one; the file's numbers are finite.
_LARGEST = 1e4
_BROKEN = "#c800c8"
_STOPS = ((255, 255, 255), (255, 237, 160), (253, 141, 60), (189, 0, 38), (90, 0, 40))
# Of the ramp: what is darker has light letters.
_DARK = 2.5


def node_data(comparison: Comparison) -> str:
    """The overlay, JSON: of each call the error of its worst tensor over steps, requests and ranks.

    Errors are in units of noise where the comparison has noise, else relative.
    """
    worst: dict[str, float] = {}
    for result in comparison.results:
        if result.measures is not None or result.status == "different":
            name, size = _name(result), size_of(result)
            worst[name] = _worse(worst.get(name, 0.0), size)
    noise = comparison.noise is not None
    results = {name: _node(size, noise) for name, size in worst.items()}
    title = "error in units of noise" if noise else "relative error"
    return json.dumps({GRAPH: {"results": results, "name": title}}, indent=1) + "\n"


def graph(comparison: Comparison) -> str:
    """The graph that the overlay is for, JSON: calls of modules, and which results are whose inputs.

    Modules are layers, with the calls that they contain; what lies between calls is not in it.
    """
    names = {_name(result): result.module for result in comparison.results}
    outer = {name for module in names.values() for name in _around(module)}
    edges = _edges(comparison)
    nodes = []
    for name, module in names.items():
        # A module with submodules is a layer, in which its own call stands.
        parts = module.split(".") if module else []
        inside = parts if module in outer else parts[:-1]
        node: dict[str, Any] = {"id": name, "label": name.split(".")[-1], "namespace": "/".join(inside)}
        sources = edges.get(name, {})
        node["incomingEdges"] = [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(at)}
            for at, source in enumerate(sources)
        ]
        nodes.append(node)
    collection = {"label": "tlcore compare", "graphs": [{"id": GRAPH, "nodes": nodes}]}
    return json.dumps(collection, indent=1) + "\n"


def _name(result: TensorResult) -> str:
    return call_name(result.module, result.call)


def _around(module: str) -> list[str]:
    parts = module.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts)))] if module else []


def _worse(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _edges(comparison: Comparison) -> Mapping[str, Mapping[str, None]]:
    """Of each call the calls whose results are its inputs, known by what they hold, in run A's first step."""
    found: dict[str, dict[str, None]] = {}
    if comparison.origin is None or not comparison.results:
        return found
    made: dict[tuple[int, str, str], str] = {}
    step = min(result.step for result in comparison.results)
    # In order of return: an input stands before the results of its call, and behind those that it is of.
    for result, (pair, _) in zip(comparison.results, comparison.origin.pairs, strict=False):
        record = pair.a.records[0]
        if result.step != step or not record.get("hash"):
            continue
        content = result.rank, str(record["hash"]), str(record["dtype"])
        if result.direction == "outputs":
            made[content] = _name(result)
        elif result.direction == "inputs" and made.get(content, _name(result)) != _name(result):
            found.setdefault(_name(result), {})[made[content]] = None
    return found


def _node(size: float, noise: bool) -> dict[str, Any]:
    if math.isnan(size):
        return {"value": _LARGEST, "bgColor": _BROKEN, "textColor": "#ffffff"}
    value = min(size, _LARGEST)
    if not value:
        return {"value": 0.0, "bgColor": "#e8f0f8", "textColor": "#1c2430"}
    begin, end = (-0.3, 1.26) if noise else (-8.0, 0.0)
    along = min(3.999, max(0.0, (math.log10(value) - begin) / (end - begin) * 4))
    low = int(along)
    mixed = (round(a + (b - a) * (along - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    colour = "#" + "".join(f"{each:02x}" for each in mixed)
    return {"value": value, "bgColor": colour, "textColor": "#ffffff" if along > _DARK else "#1c2430"}
