"""Parquet: a row for each token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .export import Job, pyarrow
from .items import pieces
from .parts import write_parts
from .tables import fixed, fixed_type

_FILE_BYTES = 256 << 20


def write(job: Job) -> None:
    """Write ``part-<n>.parquet``, in the order in which the rows were captured."""
    pa = pyarrow()
    fields = [pa.field("request_id", pa.string()), pa.field("position", pa.int64())]
    known = {"token_ids": "token_id", "response": "response"}
    known = {name: told for name, told in known.items() if name in job.data.known}
    fields += [pa.field(known[name], pa.int64() if name == "token_ids" else pa.bool_()) for name in known]
    fields += [pa.field(column.name, fixed_type(column)) for column in job.columns]
    schema = pa.schema(fields)

    def batches() -> Iterator[Any]:
        done = 0
        for piece in pieces(job):
            arrays = [pa.array(piece.requests, pa.string()), pa.array(piece.rows["positions"].numpy())]
            arrays += [pa.array(piece.rows[name].numpy()) for name in known]
            arrays += [fixed(column.array(piece.rows), column.shape) for column in job.columns]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
            done += len(piece.counts)
            job.done(done)

    write_parquet(job.target, "part-", ".parquet", schema, batches())


def write_parquet(directory: Path, begin: str, end: str, schema: Any, batches: Iterator[Any]) -> list[Path]:
    """Write record batches as row groups of files that are numbered; returns the files."""
    pyarrow()
    from pyarrow import parquet

    # The bytes of numbers one place after the other: what float32 adds to bfloat16 takes no room.
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    options["use_byte_stream_split"] = _split(schema)
    return write_parts(
        batches,
        _FILE_BYTES,
        lambda number: directory / f"{begin}{number:05d}{end}",
        lambda file: parquet.ParquetWriter(file, schema, **options),
        row_group_size=1 << 30,
    )


def _split(schema: Any) -> list[str]:
    """The paths of the columns with fractions."""
    pa = pyarrow()
    found = []
    for field in schema:
        kind, path = field.type, field.name
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            kind, path = kind.value_type, f"{path}.list.element"
        if pa.types.is_floating(kind):
            found.append(path)
    return found
