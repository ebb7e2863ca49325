"""Runs, records and summaries as the engine would make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..ledger import Counts, Ledger
from ..record import LAYOUT_VERSION, Json, Origin, Record, RunInfo, StepSummary
from ..registry import open_store
from ..storage import Location, Store


def make_run(
    url: str | Path,
    rank: int = 0,
    world_size: int = 1,
    run_id: str = "run-1",
    fsync: bool = False,
    store: Store | None = None,
    layout: int = LAYOUT_VERSION,
) -> RunInfo:
    """A run at ``url``, its ``store`` opened there, with a small, whole document."""
    document: Json = {
        "layout": layout,
        "run_id": run_id,
        "created": "2025-01-01T00:00:00+00:00",
        "host": "host",
        "pid": 1,
        "world_size": world_size,
        "config": {},
        "backend": "test",
        "versions": {},
    }
    store = store or open_store(Location(str(url), fsync=fsync))
    return RunInfo(run_id, str(url), rank, world_size, document, Ledger(), fsync, store=store)


def make_record(name: str, tensor: torch.Tensor, rank: int = 0, alias_of: str | None = None) -> Record:
    """A record named ``step_<S>/<module>/<stem>`` with a copy of the bytes of ``tensor``."""
    step, module = name.split("/")[:2]
    data = memoryview(bytes_of(tensor))
    origin = Origin(rank, module, 0, "outputs", (), tensor.dtype, tuple(tensor.shape), "cpu")
    number = int(step.removeprefix("step_"))
    return Record(name, number, origin, data, xxhash.xxh3_128_hexdigest(data), alias_of)


def make_summary(
    step: int, records: Sequence[Record] = (), rank: int = 0, rows: Sequence[Json] | None = None, **extra: Any
) -> StepSummary:
    """The summary of a step in which just ``records`` were captured, with fixed times."""
    modules = list(dict.fromkeys(record.module for record in records))
    structures = {
        f"{record.name.split('/')[1]}/outputs.json": {
            "type": "tensor",
            "shape": list(record.shape),
            "dtype": str(record.dtype),
            "numel": record.tensor().numel(),
            "device": record.device,
            "file": f"{record.name}.pt",
        }
        for record in records
    }
    counts = Counts(captured=len(records), stored=len(records))
    times = ("2025-01-01T00:00:01+00:00", "2025-01-01T00:00:02+00:00")
    return StepSummary(step, rank, modules, structures, counts, *times, rows=rows, extra=extra)


def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of three elements for each dtype that a record can have, by the dtype's name.

    Left out are those of quantized tensors and those that torch only has a name for.
    """
    tensors = {}
    for dtype in sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str):
        name = str(dtype).removeprefix("torch.")
        if name.startswith(("q", "bit")):
            continue
        count = 3 * dtype.itemsize
        # Alternating bits would not be a bool.
        pattern = [1, 0, 1] if dtype is torch.bool else [(37 * i + 5) % 120 for i in range(count)]
        tensors[name] = torch.tensor(pattern, dtype=torch.uint8).view(dtype)
    return tensors


def bytes_of(tensor: torch.Tensor) -> bytearray:
    """The C-contiguous bytes of a CPU tensor of any dtype."""
    if tensor.numel() == 0:
        return bytearray()
    return bytearray(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
