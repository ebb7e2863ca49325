"""`export`: a run's rows into a directory or a place behind a URL, in a format of another tool."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from ..._version import __version__
from ...errors import ReadError
from ...reader import Run
from ...reader.dataset.dataset import RowDataset
from .items import WINDOW_BYTES
from .job import Job, Workers
from .requests import WINDOW_BYTES as OF_REQUESTS
from .target import REMOTE_THREADS, new_target
from .values import Column, columns_of, terms_of
from .work import Cluster, Counting, Here, Progress

# Its name keeps it from being taken for data.
ABOUT = "_export.json"


class Exported(NamedTuple):
    """How many items were written, and which requests were left out, with the reason."""

    items: int
    left_out: Mapping[str, str]


class Format(NamedTuple):
    """What an item is, whether it may be a context's or needs token ids, and the module that writes it."""

    per: str
    context: bool
    token_ids: bool
    module: str


FORMATS = {
    "requests": Format("request", False, True, "requests"),
    "hf": Format("request", True, True, "hub"),
    "arrow": Format("request", True, True, "arrow"),
    "parquet": Format("token", False, False, "parquet"),
    "npy": Format("token", False, False, "npy"),
}


def export(
    run: Run,
    target: str | os.PathLike[str],
    format: str,
    tensors: Sequence[str],
    rows: str | Mapping[str, Any] = "all",
    context: int | None = None,
    loss: str = "response",
    on_item: Progress = lambda done, total: None,
    storage_options: Mapping[str, Any] | None = None,
    client: Any = None,
) -> Exported:
    """Write the rows of ``tensors`` (names without a step, or sums ``a + b``) into a new directory or URL.

    Of ``requests``, ``hf`` and ``arrow`` an item is a whole request, or with ``context`` (``hf``, ``arrow``)
    so many positions that follow one another; requests with gaps are left out. Of ``parquet`` and ``npy`` it
    is a token. ``loss`` is which positions a draft model is to be trained on (``requests``): ``"response"``
    or ``"all"``. ``storage_options`` are those of a target that is a URL. The workers of ``client``, a
    `distributed.Client`, do the work where there is one, with the same result. Raises ReadError or
    BackendError; the target is there only if everything was written.
    """
    if format not in FORMATS:
        raise ReadError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    how = FORMATS[format]
    if context is not None and not how.context:
        raise ReadError(f"the format {format} has no pieces of a context's length; hf and arrow have")
    if len(set(tensors)) != len(tensors):
        raise ReadError(f"a tensor is named twice: {', '.join(tensors)}")
    per: Any = "token" if context is not None else how.per
    data = run.dataset(terms_of(tensors), rows, context, per)
    if how.token_ids and not data.has_token_ids:
        raise ReadError(f"{run.url}: not all token ids are known, which the format {format} needs")
    columns = columns_of(data, tensors, format == "requests")
    module = import_module(f".{how.module}", __package__)
    window_bytes = OF_REQUESTS if format == "requests" else WINDOW_BYTES
    with new_target(target, storage_options) as place:
        job = Job(data, columns, place, loss, run.id, run.url, window_bytes, run.injection)
        names = module.write(job, _workers(job, format, on_item, client))
        how_made = {"format": format, "rows": rows, "context": context}
        place.document(ABOUT, _about(run, data, columns, how_made))
        place.finish(names)
    return Exported(len(data), dict(data.left_out))


def _workers(job: Job, format: str, on_item: Progress, client: Any) -> Workers:
    counting = Counting(len(job.data), on_item)
    if client is not None:
        return Cluster(client, counting)
    # Tables are read ahead by a thread of their own.
    threads = 2 if job.target.is_local else REMOTE_THREADS
    return Here(threads if format == "requests" else 1, counting)


def _about(run: Run, data: RowDataset, columns: Sequence[Column], how: Mapping[str, Any]) -> str:
    """What stands in no other file: where it comes from, and what each column was."""
    listed = [
        {"name": each.name, "dtype": each.dtype, "written": each.written_dtype, "shape": list(each.shape)}
        for each in columns
    ]
    if how["format"] == "requests":
        listed = [{key: value for key, value in each.items() if key != "written"} for each in listed]
    about = {"tlcore": __version__, "run": run.id, **how, "items": len(data), "tensors": listed}
    about["left_out"] = dict(data.left_out)
    adapters = {
        request: name for request, name in zip(data.requests, data.adapters, strict=True) if name is not None
    }
    if adapters:
        about["adapters"] = adapters
    if run.injection is not None:
        about["note"] = f"the run was {run.injection}"
    return json.dumps(about, indent=1) + "\n"
