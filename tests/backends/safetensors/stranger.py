"""A reader of segments by somebody who has only their page: nothing but safetensors, json and numpy."""

# mypy: ignore-errors
# ruff: noqa: B905
import base64
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def spread(pairs, stride):
    return [first + stride * i for first, count in zip(pairs[::2], pairs[1::2]) for i in range(count)]


def fill(node, numbers):
    if type(node) is int:
        return next(numbers)
    if isinstance(node, dict):
        return {key: fill(child, numbers) for key, child in node.items()}
    return [fill(child, numbers) for child in node] if isinstance(node, list) else node


def count(node):
    if isinstance(node, (dict, list)):
        return sum(map(count, node.values() if isinstance(node, dict) else node))
    return int(type(node) is int)


def told(index, last, skeleton, change):
    form = index["skeletons"][skeleton]
    numbers = last.setdefault(skeleton, [0] * count(form))
    changes = index["changes"][change]
    for place, difference in zip(changes[::2], changes[1::2]):
        numbers[place] += difference
    return fill(form, iter(numbers))


def read_segment(run, name):
    """Yields each step of an index: number, tensors and hashes by name, request rows, ledger, start in µs."""
    index = json.loads((Path(run) / name).read_text())
    data = [load_file(Path(run) / file["file"]) for file in index["files"]]
    arrays, steps, seen = index["arrays"], index["steps"], {}
    last_details, last_rows, started = {}, {}, 0
    for p, number in enumerate(steps["number"]):
        plan, extents = index["plans"][steps["plan"][p]], index["extents"][steps["extents"][p]]
        tensors, hashes = {}, {}
        for a, group in zip(spread(plan["arrays"], 1), spread(plan["extents"], 0)):
            stored = arrays[arrays[a].get("same_as", a)]
            begin, k = (0, 0) if stored.get("constant") else seen.get(a, (0, 0))
            rows = data[stored["file"]][stored.get("key", stored["name"])][begin : begin + extents[group]]
            full = f"step_{number}/{arrays[a]['name']}"
            tensors[full] = rows if arrays[a]["shape"] else rows[0]
            hashes[full] = base64.b64decode(stored["hashes"])[16 * k : 16 * k + 16].hex()
            seen[a] = (seen.get(a, (0, 0))[0] + extents[group], seen.get(a, (0, 0))[1] + 1)
        details = told(index, last_details, steps["details"][p], steps["change"][p])
        pairs = index["rows"][steps["rows"][p]] if steps.get("rows") and steps["rows"][p] is not None else []
        requests = [told(index, last_rows, s, c) for s, c in zip(pairs[::2], pairs[1::2])]
        started += steps["started"][p] or 0
        yield number, tensors, hashes, requests, details["ledger"], np.datetime64(started, "us")
