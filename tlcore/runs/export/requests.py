"""One safetensors file a request, as vLLM's extraction of hidden states and speculators have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import torch

from ...errors import ReadError
from ...hotpath.copying import can_write_from
from ...layout.dtypes import torch_dtype
from ...reader.dataset.reading import Maps, row_width
from ...storage import Buffer
from .disk import write_documents
from .job import Advance, Job, Part, Workers, parts_of, pyarrow
from .safetensors_file import FileOf
from .tables import Array, feature, list_feature, listed, with_features

# What is read and written at a time: few enough bytes that a processor still has them near.
WINDOW_BYTES = 32 << 20
_TABLE_ROWS = 1000
_LEAST_GATHERED = 512
_NUMBERS = list_feature(feature("int64"))
_FEATURES = {
    "input_ids": _NUMBERS,
    "loss_mask": _NUMBERS,
    "seq_len": feature("int64"),
    "request_id": feature("string"),
}
_TABLE = "data-00000-of-00001.arrow"

# Writes a file: its name, what stands before the rows, which rows, and what stands behind them.
_Put = Callable[[str, bytes, slice, Buffer], None]
# Token ids, loss mask, and whose they are.
_Row = tuple[Array, Array, str]


def write(job: Job, workers: Workers) -> list[str]:
    """Write ``hidden_states/hs_<i>.safetensors``, and the data set of token ids, whose i-th row is of it."""
    if len({(each.dtype, each.shape) for each in job.columns}) > 1:
        shown = ", ".join(f"{each.name}: {each.dtype} {list(each.shape)}" for each in job.columns)
        raise ReadError(f"the layers of hidden_states must be of one dtype and shape ({shown})")
    if job.loss not in ("response", "all"):
        raise ReadError(f'loss={job.loss!r} is neither "response" nor "all"')
    if job.loss == "response" and not job.data.has_prompts:
        raise ReadError(
            f"{job.url}: where prompts end is not known of every request, so neither is the response;"
            ' with loss="all" every position counts'
        )
    width = row_width(job.data.forms[job.columns[0].terms[0]])
    largest = int(job.data.counts_of(np.arange(len(job.data))).max(initial=0))
    job.target.check_size("a file of hidden_states", largest * (len(job.columns) * width + 8))
    pa = pyarrow()
    lists = pa.list_(pa.int64())
    schema = pa.schema(
        {"input_ids": lists, "loss_mask": lists, "seq_len": pa.int64(), "request_id": pa.string()}
    )
    with (
        job.target.file(_TABLE) as path,
        pa.ipc.new_stream(str(path), with_features(schema, _FEATURES)) as table,
        closing(workers.each(write_part, job, parts_of(job, 1, 1))) as found,
    ):
        for group in _groups(chain.from_iterable(found)):
            table.write_batch(_batch(group, schema))
    write_documents(job.target, [_TABLE], _FEATURES, f"requests {job.data.fingerprint}")
    return [_TABLE, *map(_name, range(len(job.data)))]


def _name(number: int) -> str:
    return f"hidden_states/hs_{number}.safetensors"


def _groups(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    for row in rows:
        group.append(row)
        if len(group) == _TABLE_ROWS:
            yield group
            group = []
    if group:
        yield group


def _batch(rows: Sequence[_Row], schema: Any) -> Any:
    """Requests as a record batch."""
    pa = pyarrow()
    counts = [len(ids) for ids, _, _ in rows]
    ids, masks, requests = zip(*rows, strict=True)
    arrays = [listed(pa.array(np.concatenate(column)), counts) for column in (ids, masks)]
    arrays += [pa.array(counts, pa.int64()), pa.array(requests, pa.string())]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def write_part(job: Job, part: Part, advance: Advance) -> list[_Row]:
    """Write the files of some requests, and return the rows that describe them."""
    order = job.ordered().order
    rows: list[_Row] = []
    column = job.columns[0]
    layers = {"layers": ", ".join(each.name for each in job.columns)}
    form = FileOf(
        {"hidden_states": (column.dtype, (len(job.columns), *column.shape)), "token_ids": ("int64", ())}
    )
    width = row_width(job.data.forms[column.terms[0]])
    maps = _maps(job, width)
    for window in range(part.begin, part.end):
        number, _ = order.bounds(window)
        items = order.items(window)
        counts = job.data.counts_of(items).tolist()
        known, put = _read(job, items, sum(counts)) if maps is None else _placed(job, items, maps, width)
        begin = 0
        for count in counts:
            own = slice(begin, begin + count)
            of = int(known["request"][begin])
            ids, request, adapter = known["token_ids"][own], job.data.requests[of], job.data.adapters[of]
            told = {"request_id": request, **layers, **({} if adapter is None else {"adapter": adapter})}
            put(_name(number), form.head(count, told), own, ids.data)
            mask = known["response"][own].astype(np.int64) if job.loss == "response" else np.ones_like(ids)
            # Copied: what is kept of a request keeps all that was read with it.
            rows.append((ids.copy(), mask, request))
            begin, number = begin + count, number + 1
            advance(1)
    if maps is not None and not maps.whole:
        # Of a file that was cut off meanwhile, what is left of its last page is zeros, and copied like any.
        job.data.maps()
        raise ReadError(f"{job.url}: a file of the run was cut off while it was read")
    return rows


def _maps(job: Job, width: int) -> Maps | None:
    """Maps of the run's files, for the system to copy from right into the export; None where it cannot be.

    Sums are computed, and to tell where each of many small rows lies takes longer than to copy them; those of
    one layer mostly lie side by side.
    """
    if job.target.put_gathered is None or (len(job.columns) > 1 and width < _LEAST_GATHERED):
        return None
    if not can_write_from():
        return None
    return job.maps.of(job.data) if len(_direct(job)) == len(job.columns) == len(job.data.names) else None


def _placed(job: Job, items: Any, maps: Maps, width: int) -> tuple[dict[str, Any], _Put]:
    """What is known of each position of some requests, and what writes them from where they lie."""
    places, known = job.data.places(items, maps)
    maps.used(places.size * width)
    columns = places[:, [job.data.names.index(column.terms[0]) for column in job.columns]]
    gathered = job.target.put_gathered
    assert gathered is not None
    return known, lambda name, head, own, tail: gathered(name, head, columns[own].reshape(-1), width, tail)


def _read(job: Job, items: Any, count: int) -> tuple[dict[str, Any], _Put]:
    """What is known of each position, and what writes its layers side by side; until the next are read."""
    width, layers = row_width(job.data.forms[job.columns[0].terms[0]]), len(job.columns)
    direct = _direct(job)
    apart = [name for name in job.data.names if name not in direct]
    memory = job.memory.take((layers + len(apart)) * count * width)
    states = memory[: layers * count * width].reshape(count, layers, width)
    into = {name: states[:, number] for name, number in direct.items()}
    into |= zip(apart, memory[layers * count * width :].reshape(len(apart), count, width), strict=True)
    known = job.data.fill(items, [into[name] for name in job.data.names])
    dtype = torch_dtype(job.columns[0].dtype)
    assert dtype is not None
    values = torch.from_numpy(states).view(dtype)
    for number, column in enumerate(job.columns):
        if number not in direct.values():
            _add_up([torch.from_numpy(into[name]).view(dtype) for name in column.terms], values[:, number])
    return known, lambda name, head, own, tail: job.target.put(
        name, [head, states[own].reshape(-1).data, tail]
    )


def _direct(job: Job) -> dict[str, int]:
    """The tensors that are read right to where they are written: those that are a column, and no more."""
    uses = Counter(term for column in job.columns for term in column.terms)
    alone = [(column.terms[0], number) for number, column in enumerate(job.columns) if len(column.terms) == 1]
    return {name: number for name, number in alone if uses[name] == 1}


def _add_up(terms: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    """Put the sum of terms, one added after the other as `Column.tensor` does, at its place."""
    first, *others = terms
    if not others:
        target.copy_(first)
        return
    torch.add(first, others[0], out=target)
    for other in others[1:]:
        target.add_(other)
