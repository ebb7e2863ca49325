"""NumPy files: one matrix a tensor, a row for each token, to be mapped into memory."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .export import Job
from .items import pieces

_KNOWN = {"positions": np.int64, "request": np.int64, "token_ids": np.int64, "response": np.bool_}


def write(job: Job) -> None:
    """Write ``<tensor>.npy`` for each, one file for each thing that is known, and ``requests.json``."""
    count = len(job.data)
    files: dict[str, Any] = {}
    for column in job.columns:
        path = job.target / f"{column.name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        files[column.name] = _mapped(path, column.written_dtype, (count, *column.shape))
    known = [name for name in _KNOWN if name in job.data.known]
    for name in known:
        files[name] = _mapped(job.target / f"{name}.npy", _KNOWN[name], (count,))
    numbers = {request: number for number, request in enumerate(job.data.requests)}
    done = 0
    for piece in pieces(job):
        own = slice(done, done + len(piece.counts))
        for column in job.columns:
            files[column.name][own] = column.array(piece.rows)
        for name in known:
            values = [numbers[each] for each in piece.requests] if name == "request" else piece.rows[name]
            files[name][own] = values
        done += len(piece.counts)
        job.done(done)
    for file in files.values():
        file.flush()
    (job.target / "requests.json").write_text(json.dumps(job.data.requests, indent=1), encoding="utf-8")


def _mapped(path: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    # NumPy gives this function no types.
    make: Any = np.lib.format.open_memmap
    return make(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
