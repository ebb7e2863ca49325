"""Reading a run with nothing but a store and what commits its steps, without tlcore's reader."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import torch

from tlcore.protocols import Store
from tlcore.record import tensor_from_bytes
from tlcore_backends.safetensors.index import SegmentIndex
from tlcore_backends.safetensors.segment_names import is_index

_STEP_FILE = re.compile(r"step_(\d+)/step(?:_rank_\d+)?\.json")


def committed(store: Store) -> dict[int, dict[str, torch.Tensor]]:
    """Every tensor of every committed step, by step and logical name."""
    steps: dict[int, dict[str, torch.Tensor]] = {}
    for number, document in step_documents(store):
        found = steps.setdefault(number, {})
        for record in document["records"]:
            found[record["name"]] = tensor(store, record)
    return steps


def step_documents(store: Store) -> list[tuple[int, dict[str, Any]]]:
    """Each committed step's number and ``step.json``, or what a segment's index says in its place."""
    names = sorted(entry.name for entry in store.list())
    matches = [match for name in names if (match := _STEP_FILE.fullmatch(name))]
    found = [(int(match[1]), json.loads(store.get(match[0]))) for match in matches]
    for name in filter(is_index, names):
        index = SegmentIndex(json.loads(store.get(name)), name)
        found += ((step, index.document(step)) for step in index.steps)
    return found


def structures(store: Store, number: int, document: dict[str, Any]) -> dict[str, Any]:
    """The structure files of a step, wherever the format keeps them."""
    if "structures" in document:
        return dict(document["structures"])
    directory = f"step_{number}/"
    names = [entry.name for entry in store.list(directory) if entry.name.count("/") > 1]
    return {
        name.removeprefix(directory): json.loads(store.get(name)) for name in names if name.endswith(".json")
    }


def tensor(store: Store, record: dict[str, Any]) -> torch.Tensor:
    """A record's tensor, from its ``.pt`` file or its place in a shard or segment."""
    if "file" in record:
        data = store.get(record["file"])
        assert len(data) == record["file_bytes"]
        loaded: torch.Tensor = torch.load(io.BytesIO(data), weights_only=True)
        return loaded
    data = store.get(record["shard"], *record["offsets"])
    return tensor_from_bytes(bytearray(data), getattr(torch, record["dtype"]), record["shape"])
