"""One safetensors file a request, as vLLM's extraction of hidden states and speculators have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import ReadError
from .disk import write_disk
from .export import Job, pyarrow
from .tables import feature, list_feature
from .values import in_order


def write(job: Job) -> None:
    """Write ``hidden_states/hs_<i>.safetensors``, and the data set of token ids, whose i-th row is of it."""
    if len({(each.dtype, each.shape) for each in job.columns}) > 1:
        shown = ", ".join(f"{each.name}: {each.dtype} {list(each.shape)}" for each in job.columns)
        raise ReadError(f"the layers of hidden_states must be of one dtype and shape ({shown})")
    if job.loss not in ("response", "all"):
        raise ReadError(f'loss={job.loss!r} is neither "response" nor "all"')
    if job.loss == "response" and not job.data.has_prompts:
        raise ReadError(
            f"{job.run.url}: where prompts end is not known of every request, so neither is the response;"
            ' with loss="all" every position counts'
        )
    pa = pyarrow()
    lists = pa.list_(pa.int64())
    schema = pa.schema(
        {"input_ids": lists, "loss_mask": lists, "seq_len": pa.int64(), "request_id": pa.string()}
    )
    numbers = list_feature(feature("int64"))
    features = {
        "input_ids": numbers,
        "loss_mask": numbers,
        "seq_len": feature("int64"),
        "request_id": feature("string"),
    }
    (job.target / "hidden_states").mkdir()
    write_disk(job.target, schema, features, _batches(job, schema), f"requests {job.data.fingerprint}")


def _batches(job: Job, schema: Any) -> Iterator[Any]:
    """Writes the files, and gives the rows that describe them."""
    pa = pyarrow()
    rows: list[dict[str, Any]] = []
    for number, item in enumerate(in_order(job.data)):
        ids = item["token_ids"]
        loss = item["response"] if job.loss == "response" else torch.ones_like(ids)
        states = torch.stack([column.tensor(item) for column in job.columns], 1)
        request_id = job.data.requests[int(item["request"])]
        save_file(
            {"hidden_states": states, "token_ids": ids},
            job.target / "hidden_states" / f"hs_{number}.safetensors",
            {"request_id": request_id, "layers": ", ".join(column.name for column in job.columns)},
        )
        mask = loss.long().tolist()
        rows.append(
            {"input_ids": ids.tolist(), "loss_mask": mask, "seq_len": len(ids), "request_id": request_id}
        )
        if len(rows) == 1000:
            yield pa.RecordBatch.from_pylist(rows, schema)
            rows = []
        job.done(number + 1)
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema)
