"""A directory that `datasets.load_from_disk` opens, with arrays of one shape where items have one length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .disk import write_disk
from .export import Job, pyarrow
from .items import piece_columns, pieces, sequence_features
from .tables import box_field, boxes, feature, list_feature


def write(job: Job) -> None:
    """Write whole requests, or pieces of a context: then as SAELens has its cached activations."""
    identity = f"arrow {[column.name for column in job.columns]} {job.data.fingerprint}"
    if job.data.ragged:
        schema, features = sequence_features(job)
        batches = (piece_columns(job, piece, schema) for piece in pieces(job))
        write_disk(job.target, schema, features, batches, identity)
        return
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
    schema = pa.schema(fields)
    write_disk(job.target, schema, features, _batches(job, schema, context), identity)


def _batches(job: Job, schema: Any, context: int) -> Iterator[Any]:
    pa = pyarrow()
    done = 0
    for items in pieces(job):
        rows = items.rows
        count = len(items.counts)
        starts = range(0, count * context, context)
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(rows["token_ids"].int().numpy()), context),
            pa.array([items.requests[start] for start in starts], pa.string()),
            pa.array(rows["positions"].numpy()[::context]),
        ]
        arrays += [boxes(column.array(rows), count, (context, *column.shape)) for column in job.columns]
        done += count
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        job.done(done)
