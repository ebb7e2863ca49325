"""Parquet: a row for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .items import Piece, pieces
from .job import Advance, Job, Part, Workers, do_all, parts_of, pyarrow
from .tables import fixed, fixed_type

# Of the rows as they were captured: what their dtypes are widened by takes no room in the file.
_FILE_BYTES = 256 << 20
_KNOWN = {"token_ids": "token_id", "response": "response"}


def write(job: Job, workers: Workers) -> list[str]:
    """Write ``part-<n>.parquet``, in the order in which the rows were captured."""
    parts = file_parts(job)
    do_all(workers, write_part, job, parts)
    return [_name(part) for part in parts]


def file_parts(job: Job) -> list[Part]:
    """What each file has."""
    return parts_of(job, job.data.row_bytes, _FILE_BYTES)


def _name(part: Part) -> str:
    return f"part-{part.number:05d}.parquet"


def write_part(job: Job, part: Part, advance: Advance) -> None:
    """Write one file."""
    pa = pyarrow()
    fields = [pa.field("request_id", pa.string()), pa.field("position", pa.int64())]
    known = {name: told for name, told in _KNOWN.items() if name in job.data.known}
    fields += [pa.field(known[name], pa.int64() if name == "token_ids" else pa.bool_()) for name in known]
    fields += [pa.field(column.name, fixed_type(column)) for column in job.columns]
    schema = pa.schema(fields)

    def batch(piece: Piece) -> Any:
        arrays = [pa.array(piece.requests, pa.string()), pa.array(piece.rows["positions"].numpy())]
        arrays += [pa.array(piece.rows[name].numpy()) for name in known]
        arrays += [fixed(column.array(piece.rows), column.shape) for column in job.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    write_parquet(job, part, _name(part), schema, batch, advance)


def write_parquet(
    job: Job, part: Part, name: str, schema: Any, batch: Callable[[Piece], Any], advance: Advance
) -> None:
    """Write what ``batch`` makes of each piece as the row groups of a file."""
    pyarrow()
    from pyarrow import parquet

    # The bytes of numbers one place after the other: what float32 adds to bfloat16 takes no room.
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    options["use_byte_stream_split"] = _split(schema)
    with job.target.file(name) as path, parquet.ParquetWriter(path, schema, **options) as table:
        for piece in pieces(job, part):
            table.write_batch(batch(piece), row_group_size=1 << 30)
            advance(len(piece.counts))


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
