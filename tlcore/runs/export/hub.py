"""A data set as the Hugging Face hub has them: Parquet files, and a card that names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .export import Job
from .items import piece_columns, pieces, sequence_features
from .parquet import write_parquet
from .tables import with_features

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# Activations of {count} {what}

Of the run `{run}`, written by tlcore. `token_ids` are those of the positions from `first_position` on;
every other column has as many rows:

{columns}
"""


def write(job: Job) -> None:
    """Write ``data/train-<n>-of-<all>.parquet`` and ``README.md``; a row is a request, or a piece of one."""
    schema, features = sequence_features(job)
    folder = job.target / "data"
    folder.mkdir()

    def batches() -> Iterator[Any]:
        done = 0
        for piece in pieces(job):
            yield piece_columns(job, piece, schema)
            done += len(piece.counts)
            job.done(done)

    made = write_parquet(folder, "part-", "", with_features(schema, features), batches())
    for number, part in enumerate(made):
        part.rename(folder / f"train-{number:05d}-of-{len(made):05d}.parquet")
    columns = "\n".join(f"- `{each.name}`: {_told(each.dtype, each.written_dtype)}" for each in job.columns)
    what = "requests" if job.data.ragged else f"pieces of {job.data.context} positions"
    card = _CARD.format(count=len(job.data), what=what, run=job.run.id, columns=columns)
    (job.target / "README.md").write_text(card, encoding="utf-8")


def _told(dtype: str, written: str) -> str:
    if dtype == written:
        return dtype
    return f"{dtype}, as {written}: casting back to {dtype} gives the captured values, bit for bit"
