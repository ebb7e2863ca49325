"""A tlcore backend that keeps each rank of a run in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from tlcore.errors import BackendError
from tlcore.record import Record, RunInfo, StepSummary, tensor_from_bytes

_TABLES = """
CREATE TABLE run (document TEXT NOT NULL);
CREATE TABLE steps (step INTEGER PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE tensors (
    name TEXT PRIMARY KEY, step INTEGER NOT NULL, alias_of TEXT,
    dtype TEXT NOT NULL, shape TEXT NOT NULL, compressed INTEGER NOT NULL, data BLOB
);
"""


class SqliteSink:
    """Writes ``<run>/rank_<r>.sqlite``; a step and its tensors appear in one transaction.

    ``compress`` stores tensors deflated.
    """

    options_schema: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"compress": {"type": "boolean", "default": False}},
    }

    def __init__(self, compress: bool = False) -> None:
        self._compress = compress

    def open(self, run: RunInfo) -> None:
        """Make the file. Raises BackendError when it cannot be made or exists already."""
        if "://" in run.url:
            raise BackendError("the sqlite backend writes to local directories only")
        path = Path(run.url) / f"rank_{run.rank}.sqlite"
        try:
            path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            # The pipeline uses a sink from one thread at a time, though not always the same one.
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.executescript(_TABLES)
            self._file.execute("INSERT INTO run VALUES (?)", [json.dumps(run.document)])
        except (OSError, sqlite3.Error) as error:
            raise BackendError(f"cannot make {path}: {error}") from error
        self._step: int | None = None
        self._names: set[str] = set()

    def write(self, batch: Sequence[Record]) -> None:
        """Insert records of one step; none is visible before the step is committed."""
        for record in batch:
            self._enter(record.step)
            known = record.alias_of in self._names
            data = None if known else zlib.compress(record.data, 1) if self._compress else record.data
            self._file.execute(
                "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    *(record.name, record.step, record.alias_of if known else None),
                    *(str(record.dtype).removeprefix("torch."), json.dumps(record.shape)),
                    *(self._compress, data),
                ],
            )
            self._names.add(record.name)

    def commit_step(self, step: StepSummary) -> None:
        """Make the step and its tensors visible."""
        self._enter(step.step)
        document = {**step.to_json([]), "structures": dict(step.structures)}
        self._file.execute("INSERT INTO steps VALUES (?, ?)", [step.step, json.dumps(document)])
        self._file.execute("COMMIT")
        self._step = None

    def close(self) -> None:
        """Close the file; a step that was not committed is gone."""
        self._abandon()
        self._file.close()

    def _enter(self, step: int) -> None:
        if step != self._step:
            self._abandon()
            self._file.execute("BEGIN")
            self._step = step
            self._names = set()

    def _abandon(self) -> None:
        if self._file.in_transaction:
            self._file.execute("ROLLBACK")
        self._step = None


def read(path: str | Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Each tensor in a file: its step, its logical name, and itself."""
    file = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        for row in file.execute(
            "SELECT t.step, t.name, t.dtype, t.shape, o.compressed, o.data FROM tensors t"
            " JOIN tensors o ON o.name = COALESCE(t.alias_of, t.name) ORDER BY t.rowid"
        ):
            step, name, dtype, shape, compressed, data = row
            content = zlib.decompress(data) if compressed else data
            yield step, name, tensor_from_bytes(bytearray(content), getattr(torch, dtype), json.loads(shape))
    finally:
        file.close()


def steps(path: str | Path) -> list[int]:
    """The committed steps in a file."""
    file = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return [step for (step,) in file.execute("SELECT step FROM steps ORDER BY step")]
    finally:
        file.close()
