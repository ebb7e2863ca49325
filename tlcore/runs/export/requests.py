"""One safetensors file a request, as vLLM's extraction of hidden states and speculators have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...errors import ReadError
from ...hotpath.reading import Scratch
from ...reader.stored import payload
from .disk import write_disk
from .export import Job, pyarrow
from .safetensors_file import write_safetensors
from .tables import Array, feature, list_feature, listed
from .values import in_order

# Token ids, loss mask, and whose they are.
_Row = tuple[Array, Array, str]


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
    rows: list[_Row] = []
    scratch = Scratch()
    for number, item in enumerate(in_order(job.data).views()):
        ids = item["token_ids"]
        loss = item["response"] if job.loss == "response" else torch.ones_like(ids)
        request_id = job.data.requests[int(item["request"])]
        (column, *_), count = job.columns, len(ids)
        shape = (count, len(job.columns), *column.shape)
        write_safetensors(
            job.target / "hidden_states" / f"hs_{number}.safetensors",
            {
                "hidden_states": (column.dtype, shape, _states(job, item, scratch)),
                "token_ids": ("int64", (count,), payload(ids)),
            },
            {"request_id": request_id, "layers": ", ".join(column.name for column in job.columns)},
        )
        # Copied: what is kept of an item keeps all that was read with it.
        rows.append((ids.numpy().copy(), loss.numpy().astype(np.int64), request_id))
        if len(rows) == 1000:
            yield _table(rows, schema)
            rows = []
        job.done(number + 1)
    if rows:
        yield _table(rows, schema)


def _table(rows: list[_Row], schema: Any) -> Any:
    """Requests as a record batch."""
    pa = pyarrow()
    counts = [len(ids) for ids, _, _ in rows]
    ids, masks, requests = zip(*rows, strict=True)
    arrays = [listed(pa.array(np.concatenate(column)), counts) for column in (ids, masks)]
    arrays += [pa.array(counts, pa.int64()), pa.array(requests, pa.string())]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _states(job: Job, item: dict[str, torch.Tensor], scratch: Scratch) -> memoryview:
    """The layers of each token side by side, ``[tokens, layers, size]``, as bytes until the next ones."""
    layers = [payload(column.tensor(item)) for column in job.columns]
    if len(layers) == 1:
        return layers[0]
    count, size = len(item["token_ids"]), sum(map(len, layers))
    # Memory that was touched before: taking new memory costs more than copying.
    memory = memoryview(scratch.take(size))[:size]
    target = np.frombuffer(memory, np.uint8).reshape(count, len(layers), -1)
    for number, layer in enumerate(layers):
        target[:, number] = np.frombuffer(layer, np.uint8).reshape(count, -1)
    return memory
