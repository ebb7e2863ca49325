"""Items by the dozen, as rows one after the other and how many each item has, and tables of them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from .job import Job, Part, pyarrow
from .tables import feature, fixed, fixed_type, list_feature, listed

# What is turned into one record batch or row group.
_PIECE_BYTES = 8 << 20


class Piece(NamedTuple):
    """Some items: their rows one after the other, the request of each row, and the number of each item's."""

    rows: dict[str, torch.Tensor]
    requests: list[str]
    counts: list[int]


# What is read at a time, where files have no bound that is smaller.
WINDOW_BYTES = 64 << 20


def pieces(job: Job, part: Part) -> Iterator[Piece]:
    """A part's items in order, a few MB of rows at a time."""
    ordered = job.ordered()
    most = max(1, _PIECE_BYTES // max(1, job.data.row_bytes))
    stop = ordered.order.bounds(part.end - 1)[1]
    for window in range(part.begin, part.end):
        begin, _ = ordered.order.bounds(window)
        counts = job.data.counts_of(ordered.order.items(window)).tolist()
        first = held = 0
        for place, count in enumerate(counts, 1):
            held += count
            if held >= most or place == len(counts):
                (found,) = ordered.batches(begin + first, begin + place, stop)
                yield _piece(job, found, counts[first:place])
                first, held = place, 0


def _piece(job: Job, found: Any, counts: list[int]) -> Piece:
    if isinstance(found, list):
        rows = {name: torch.cat([item[name] for item in found]) for name in found[0] if name != "request"}
        numbers = [int(item["request"]) for item in found]
    else:
        sequences = job.data.context is not None
        numbers = found.pop("request").tolist()
        rows = {name: values.flatten(0, 1) if sequences else values for name, values in found.items()}
    ids = [job.data.requests[number] for number in numbers]
    return Piece(rows, [each for each, count in zip(ids, counts, strict=True) for _ in range(count)], counts)


def sequence_features(job: Job) -> tuple[Any, dict[str, Any]]:
    """The schema of items of any length, and what `datasets` says of its columns."""
    pa = pyarrow()
    fields = [pa.field("request_id", pa.string()), pa.field("first_position", pa.int64())]
    fields.append(pa.field("token_ids", pa.list_(pa.int64())))
    features = {"request_id": feature("string"), "first_position": feature("int64")}
    features["token_ids"] = list_feature(feature("int64"))
    if job.data.has_prompts:
        fields.append(pa.field("response", pa.list_(pa.bool_())))
        features["response"] = list_feature(feature("bool"))
    for column in job.columns:
        inner = feature(column.written_dtype)
        for size in reversed(column.shape):
            inner = list_feature(inner, size)
        fields.append(pa.field(column.name, pa.list_(fixed_type(column))))
        features[column.name] = list_feature(inner)
    return pa.schema(fields), features


def piece_columns(job: Job, piece: Piece, schema: Any) -> Any:
    """Items as a record batch of the schema of `sequence_features`."""
    pa = pyarrow()
    rows, counts = piece.rows, piece.counts
    firsts = [0]
    for count in counts[:-1]:
        firsts.append(firsts[-1] + count)
    arrays = [
        pa.array([piece.requests[first] for first in firsts], pa.string()),
        pa.array(rows["positions"][firsts].numpy()),
        listed(pa.array(rows["token_ids"].numpy()), counts),
    ]
    if job.data.has_prompts:
        arrays.append(listed(pa.array(rows["response"].numpy()), counts))
    arrays += [listed(fixed(column.array(rows), column.shape), counts) for column in job.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def written_bytes(job: Job) -> int:
    """How many bytes a row has of all columns, as they are written."""
    return sum(np.dtype(each.written_dtype).itemsize * prod(each.shape) for each in job.columns)
