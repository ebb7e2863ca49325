"""A captured run once more, with a fault in it and with the hashes of what it then holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

import tlcore
from tests.fuzz.plants import PLANTS
from tlcore.analysis.selftest.layers import layers_of
from tlcore.layout.grids import as_rows
from tlcore.reader import Run, Step
from tlcore.record import Json, Origin, Record, RunInfo
from tlcore.runs.conversion import summary_of
from tlcore.testing.run_writer import RunWriter
from tlcore.testing.samples import bytes_of
from tlcore_backends.pt.sink import PtSink

# What stands in the place of a record's tensor.
Change = Callable[[Step, Json, torch.Tensor], torch.Tensor]


def _unchanged(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def rewritten(
    source: Run,
    directory: Path,
    change: Change = _unchanged,
    rows: Callable[[list[Any]], None] = lambda rows: None,
    steps: Sequence[int] | None = None,
) -> Run:
    """A run like ``source``, in ``directory``, of the results of its layers alone."""
    numbers = layers_of(source)
    target = directory / source.id
    run = RunInfo(source.id, str(target), 0, 1, {**source.document, "ledger": {}}, tlcore.ledger.Ledger())
    writer = RunWriter(PtSink(), run=dataclasses.replace(run, store=None))
    for number in source.steps if steps is None else steps:
        step = source.step(number)
        kept = [each for each in step.records if each["module"] in numbers and each["direction"] == "outputs"]
        writer.write([_record(number, each, change(step, each, step.tensor(each["name"]))) for each in kept])
        summary = summary_of(step, 0)
        own, more = copy.deepcopy(summary.rows), copy.deepcopy(dict(summary.extra))
        rows(list(own or more["call_rows"][0]["sets"][0]["rows"]))
        shown = {name: each for name, each in summary.structures.items() if name.endswith("/outputs.json")}
        writer.commit_step(dataclasses.replace(summary, rows=own, extra=more, structures=shown))
    writer.close()
    return tlcore.open_run(target)


def _record(step: int, entry: Json, tensor: torch.Tensor) -> Record:
    data = memoryview(bytes_of(tensor))
    assert list(tensor.shape) == entry["shape"]
    origin = Origin(
        0, entry["module"], entry["call"], entry["direction"], tuple(entry["path"]),
        tensor.dtype, tuple(tensor.shape), entry["device"],
    )  # fmt: skip
    return Record(entry["name"], step, origin, data, xxhash.xxh3_128_hexdigest(data))


def _permuted(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    """Every step's rows in another order."""
    return tensor.flip(0) if tensor.ndim == 2 else tensor.flip(1)


def _two_rows(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    """In one layer, the first and the last row of each step have changed places."""
    if not record["module"].endswith(".1"):
        return tensor
    found = tensor.clone()
    rows = found if found.ndim == 2 else found[0]
    rows[[0, -1]] = rows[[-1, 0]]
    return found


def _next_layer(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    """Each layer but the last has what the next one handed on."""
    before, _, number = record["module"].rpartition(".")
    name = record["name"].replace(record["module"], f"{before}.{int(number) + 1}")
    return step.tensor(name) if name in step else tensor


def _zeroed(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    """The rows of one request are zeros."""
    found = tensor.clone()
    for span in step.row_spans(record):
        if span.row.get("external_request_id", span.row["request_id"])[-1] in "26":
            as_rows(found, span.axis)[span.begin : span.begin + span.length] = 0
    return found


def _overwritten(step: Step, record: Json, tensor: torch.Tensor) -> torch.Tensor:
    """The copy was made too late: some numbers of the last layer's rows are the next step's."""
    if not record["module"].endswith(".3"):
        return tensor
    found = tensor.clone()
    found[..., : found.shape[-1] // 2] *= 1.01
    return found


TENSORS: dict[str, Change] = {
    "permuted": _permuted,
    "two rows": _two_rows,
    "next layer": _next_layer,
    "zeroed": _zeroed,
    "overwritten": _overwritten,
}
ROWS = {name: plant for name, plant in PLANTS.items() if name in ("later", "longer", "swapped")}
