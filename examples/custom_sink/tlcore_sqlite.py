"""A tlcore backend with both sides: each rank of a run in one SQLite file, written and read back."""

import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from tlcore import Backend, BackendError, Record, RunInfo, StepSummary, Store
from tlcore.protocols import StepRanks, SupportsFiles

TABLES = "CREATE TABLE steps (step UNIQUE, document); CREATE TABLE tensors (row UNIQUE, compressed, data)"


def connect(store: Store | None, name: str) -> Any:
    """Open a file in a run's directory, which the engine has made."""
    if not isinstance(store, SupportsFiles):
        raise BackendError(f"{store and store.url}: the sqlite backend needs a local directory")
    return sqlite3.connect(store.path(name), check_same_thread=False)


class SqliteSink:
    """Writes ``<run>/rank_<r>.sqlite``; a step and its tensors appear in one transaction."""

    def __init__(self, compress: bool = False) -> None:
        self._compress = compress
        self._step, self._rows, self._records = -1, dict[str, str](), list[dict[str, Any]]()

    def open(self, run: RunInfo) -> None:
        """Make the file."""
        self._file = connect(run.store, f"rank_{run.rank}.sqlite")
        self._file.executescript(TABLES)

    def write(self, batch: Sequence[Record]) -> None:
        """Insert records of one step. A record's further keys are our own: by them `read` finds the bytes."""
        for record in batch:
            self._enter(record.step)
            row = self._rows.get(record.alias_of or "")
            if row is None:
                row, record = record.name, record._replace(alias_of=None)
                data = zlib.compress(record.data, 1) if self._compress else record.data
                self._file.execute("INSERT INTO tensors VALUES (?, ?, ?)", [row, self._compress, data])
            self._rows[record.name] = row
            self._records.append({**record.describe(), "sqlite": f"rank_{record.rank}.sqlite", "row": row})

    def commit_step(self, step: StepSummary) -> None:
        """Make the step and its tensors visible."""
        self._enter(step.step)
        document = {**step.to_json(self._records), "structures": dict(step.structures)}
        self._file.execute("INSERT INTO steps VALUES (?, ?)", [step.step, json.dumps(document)])
        self._file.commit()

    def close(self) -> None:
        """Close the file; SQLite takes back a step that was not committed."""
        self._file.close()

    def _enter(self, step: int) -> None:
        if step != self._step:
            self._file.rollback()
            self._step, self._rows, self._records = step, {}, []


class SqliteSource:
    """Reads the files of all ranks."""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        names = [name for name, _ in store.list("rank_") if name.endswith(".sqlite")]
        self._files = {name: connect(store, name) for name in names}
        self.steps: dict[int, StepRanks] = {}
        for name, file in self._files.items():
            for (step,) in file.execute("SELECT step FROM steps"):
                before = self.steps.get(step, StepRanks(frozenset()))
                self.steps[step] = StepRanks(before.committed | {int(name[5:-7])})

    def document(self, step: int, rank: int) -> Any:
        """What `SqliteSink.commit_step` stored."""
        query = "SELECT document FROM steps WHERE step = ?"
        return json.loads(self._files[f"rank_{rank}.sqlite"].execute(query, [step]).fetchone()[0])

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> bytes:
        """The bytes of a tensor."""
        query = "SELECT compressed, data FROM tensors WHERE row = ?"
        compressed, data = self._files[record["sqlite"]].execute(query, [record["row"]]).fetchone()
        return bytes(zlib.decompress(data) if compressed else data)[begin:end]

    def remains(self, step: int) -> dict[str, Any]:
        """Nothing is left of a step that was not committed."""
        return {}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


SCHEMA = {"properties": {"compress": {"type": "boolean"}}, "additionalProperties": False}
BACKEND = Backend(sink=SqliteSink, source=SqliteSource, options_schema=SCHEMA)
