"""A directory that `datasets.load_from_disk` opens, with arrays of one shape where items have one length."""

from __future__ import annotations

from typing import Any

from .disk import FILE_BYTES, table_name, write_documents
from .items import Piece, piece_columns, pieces, sequence_features, written_bytes
from .job import Advance, Job, Part, Workers, do_all, parts_of, pyarrow
from .tables import box_field, boxes, feature, list_feature, with_features


def write(job: Job, workers: Workers) -> list[str]:
    """Write whole requests, or pieces of a context: then as SAELens has its cached activations."""
    _, features = _described(job)
    parts = parts_of(job, written_bytes(job), FILE_BYTES)
    do_all(workers, write_part, job, parts)
    names = [table_name(part.number, part.count) for part in parts]
    identity = f"arrow {[column.name for column in job.columns]} {job.data.fingerprint}"
    write_documents(job.target, names, features, identity)
    return names


def write_part(job: Job, part: Part, advance: Advance) -> None:
    """Write one file."""
    schema, features = _described(job)
    schema = with_features(schema, features)
    with (
        job.target.file(table_name(part.number, part.count)) as path,
        pyarrow().ipc.new_stream(str(path), schema) as table,
    ):
        for piece in pieces(job, part):
            batch = piece_columns(job, piece, schema) if job.data.ragged else _boxed(job, piece, schema)
            table.write_batch(batch)
            advance(len(piece.counts))


def _described(job: Job) -> tuple[Any, dict[str, Any]]:
    """The schema, and what `datasets` says of its columns."""
    if job.data.ragged:
        return sequence_features(job)
    pa = pyarrow()
    context = job.data.context or 1
    ids = list_feature(feature("int32"), context)
    features = {"token_ids": ids, "request_id": feature("string"), "first_position": feature("int64")}
    fields = [
        pa.field("token_ids", pa.list_(pa.int32(), context)),
        pa.field("request_id", pa.string()),
        pa.field("first_position", pa.int64()),
    ]
    for column in job.columns:
        shape = (context, *column.shape)
        features[column.name] = {
            "shape": list(shape),
            "dtype": column.written_dtype,
            "_type": f"Array{len(shape)}D",
        }
        fields.append(box_field(column.name, column.written_dtype, shape))
    return pa.schema(fields), features


def _boxed(job: Job, piece: Piece, schema: Any) -> Any:
    """Pieces of a context as a record batch."""
    pa = pyarrow()
    rows, count, context = piece.rows, len(piece.counts), job.data.context or 1
    starts = range(0, count * context, context)
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(rows["token_ids"].int().numpy()), context),
        pa.array([piece.requests[start] for start in starts], pa.string()),
        pa.array(rows["positions"].numpy()[::context]),
    ]
    arrays += [boxes(column.array(rows), count, (context, *column.shape)) for column in job.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
