"""NumPy files: one matrix a tensor, a row for each token, to be mapped into memory."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ReadError
from .items import pieces
from .job import Advance, Job, Part, Workers, do_all, parts_of

_KNOWN = {"positions": np.int64, "request": np.int64, "token_ids": np.int64, "response": np.bool_}
# What one of several workers does at a time.
_PART_BYTES = 256 << 20


def write(job: Job, workers: Workers) -> list[str]:
    """Write ``<tensor>.npy`` for each, one file for each thing that is known, and ``requests.json``.

    Several workers write into the same files.
    """
    if not (job.target.is_local or workers.share_memory):
        raise ReadError(
            "an array of npy is one object, which several workers cannot write at a URL:"
            " export into a directory that all of them see, or as parquet"
        )
    count = len(job.data)
    forms: dict[str, tuple[Any, tuple[int, ...]]] = {
        column.name: (column.written_dtype, (count, *column.shape)) for column in job.columns
    }
    forms |= {name: (_KNOWN[name], (count,)) for name in _KNOWN if name in job.data.known}
    for name, (dtype, shape) in forms.items():
        job.target.check_size(f"{name}.npy", prod(shape) * np.dtype(dtype).itemsize)
    with ExitStack() as stack:
        paths = {name: stack.enter_context(job.target.file(f"{name}.npy")) for name in forms}
        for name, form in forms.items():
            _made(paths[name], *form)
        parts = parts_of(job, job.data.row_bytes, _PART_BYTES)
        do_all(workers, partial(write_part, paths), job, parts)
    job.target.document("requests.json", json.dumps(job.data.requests, indent=1))
    return [f"{name}.npy" for name in forms]


def write_part(paths: dict[str, Path], job: Job, part: Part, advance: Advance) -> None:
    """Write some rows of each file."""
    files = {name: np.load(path, mmap_mode="r+") for name, path in paths.items()}
    numbers = {request: number for number, request in enumerate(job.data.requests)}
    done = job.ordered().order.bounds(part.begin)[0]
    for piece in pieces(job, part):
        own = slice(done, done + len(piece.counts))
        for column in job.columns:
            files[column.name][own] = column.array(piece.rows)
        for name in _KNOWN:
            if name in files:
                values = [numbers[each] for each in piece.requests] if name == "request" else piece.rows[name]
                files[name][own] = values
        done += len(piece.counts)
        advance(len(piece.counts))
    for file in files.values():
        file.flush()


def _made(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    # NumPy gives this function no types.
    make: Any = np.lib.format.open_memmap
    make(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A full disk is an error here, and would kill the process where it is met in mapped memory.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
