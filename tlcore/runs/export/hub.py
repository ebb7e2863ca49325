"""A data set as the Hugging Face hub has them: Parquet files, and a card that names them."""

from __future__ import annotations

from .items import piece_columns, sequence_features
from .job import Advance, Job, Part, Workers, do_all
from .parquet import file_parts, write_parquet
from .tables import with_features

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# Activations of {count} {what}

Of the run `{run}`, written by tlcore.{note} `token_ids` are those of the positions from `first_position` on;
every other column has as many rows:

{columns}
"""


def write(job: Job, workers: Workers) -> list[str]:
    """Write ``data/train-<n>-of-<all>.parquet`` and ``README.md``; a row is a request, or a piece of one."""
    parts = file_parts(job)
    do_all(workers, write_part, job, parts)
    columns = "\n".join(f"- `{each.name}`: {_told(each.dtype, each.written_dtype)}" for each in job.columns)
    what = "requests" if job.data.ragged else f"pieces of {job.data.context} positions"
    note = f" It was {job.injection}." if job.injection else ""
    card = _CARD.format(count=len(job.data), what=what, run=job.run_id, columns=columns, note=note)
    job.target.document("README.md", card)
    return [_name(part) for part in parts]


def _name(part: Part) -> str:
    return f"data/train-{part.number:05d}-of-{part.count:05d}.parquet"


def write_part(job: Job, part: Part, advance: Advance) -> None:
    """Write one file."""
    schema, features = sequence_features(job)
    schema = with_features(schema, features)
    write_parquet(job, part, _name(part), schema, lambda piece: piece_columns(job, piece, schema), advance)


def _told(dtype: str, written: str) -> str:
    if dtype == written:
        return dtype
    return f"{dtype}, as {written}: casting back to {dtype} gives the captured values, bit for bit"
