"""One tensor of every step, as one: its rows one step after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TYPE_CHECKING

from ..errors import MissingError, ReadError
from ..layout.dtypes import torch_dtype
from ..layout.row_scale import STORED as PACKED
from ..layout.row_scale import is_scaled
from ..protocols import Array
from ..record import Json, tensor_from_bytes
from .bulk import read_payloads
from .step import Step
from .stored import Stored
from .tensor_bytes import kind, payload

if TYPE_CHECKING:
    import torch

_REMOTE_THREADS = 8


def tensor_over_steps(
    stored: Stored, run: Mapping[int, Step], steps: Sequence[int], name: str
) -> tuple[torch.Tensor, Json]:
    """The tensor ``name`` (without a step) of all ``steps`` that have it, joined in its first dimension.

    Those without dimensions are stacked. With it comes the first step's record.

    Raises MissingError where no step has it, ReadError where its dtype
    or its other dimensions are not the same in every step.
    """
    record = _found(stored, run, steps, name)
    key = str(record["name"]).partition("/")[2]
    # An array has the rows of steps that are not whole, too.
    if stored.has_arrays and len(steps) == len(stored.steps):
        arrays = list(stored.arrays(record["rank"], {key}))
        if any(array.dtype == PACKED for array in arrays):
            _check_scales(stored, [row.record for array in arrays for row in array.rows], key)
        return _from_arrays(stored, arrays, key), record
    records = list(_records(run, steps, key))
    _check_scales(stored, records, key)
    return _from_records(stored, records, key), record


def _check_scales(stored: Stored, records: Sequence[Json], key: str) -> None:
    """Raise ReadError where some of the tensors are rows with a scale, and others are not, or of others."""
    forms = {each["converted_from"] if is_scaled(each) else None for each in records}
    if len(forms) > 1:
        raise _mixed(stored, key, [f"int8 of {form}" if form else "as it was" for form in forms])


def _found(stored: Stored, run: Mapping[int, Step], steps: Sequence[int], name: str) -> Json:
    """The record of the tensor in the first step that has it."""
    first: MissingError | None = None
    for number in steps:
        try:
            return run[number].record(f"step_{number}/{name}")
        except MissingError as error:
            first = first or error
    raise first or MissingError(f"{stored.url}: no tensor {name!r}; the run has no whole step")


def _records(run: Mapping[int, Step], steps: Sequence[int], key: str) -> Iterator[Json]:
    for number in steps:
        step, name = run[number], f"step_{number}/{key}"
        if step.has_record(name):
            yield step.record(name)


def _from_arrays(stored: Stored, arrays: Sequence[Array], key: str) -> torch.Tensor:
    import torch

    forms = {(array.dtype, tuple(array.shape[1:]), _dimensions(array, len(arrays))) for array in arrays}
    if len(forms) != 1:
        raise _mixed(stored, key, [f"{dtype} {['n', *row]}" for dtype, row, _ in sorted(forms)])
    ((dtype_name, row, _),) = forms
    dtype = torch_dtype(dtype_name)
    if dtype is None:
        raise ReadError(f"{stored.url}: {key!r}: there is no dtype {dtype_name[:100]!r}")
    where = f"{stored.url}: {key!r}"
    total = sum(array.shape[0] for array in arrays)
    try:
        joined = torch.empty((total, *row), dtype=dtype)
    except (RuntimeError, OverflowError, MemoryError):
        raise ReadError(f"{where}: larger than this machine's memory") from None
    width, whole = prod(row) * dtype.itemsize, payload(joined)
    ends = [0]
    for array in arrays:
        ends.append(ends[-1] + array.shape[0])

    def copy(number: int) -> None:
        data, begin, end = stored.read_array(arrays[number]), ends[number], ends[number + 1]
        size = memoryview(data).nbytes
        if size != (end - begin) * width:
            raise ReadError(f"{where}: ends too early or is damaged ({size} bytes of {end - begin} rows)")
        if size:
            whole[begin * width : end * width] = memoryview(data).cast("B")

    if stored.is_local:
        for number in range(len(arrays)):
            copy(number)
        return joined
    with ThreadPoolExecutor(_REMOTE_THREADS, "tlcore-read") as pool:
        list(pool.map(copy, range(len(arrays))))
    return joined


def _dimensions(array: Array, arrays: int) -> int:
    """How many dimensions a step's tensor has, where that is not plain: rows of numbers, or numbers."""
    return len(array.rows[0].record["shape"]) if arrays > 1 and len(array.shape) == 1 else -1


def _from_records(stored: Stored, records: Sequence[Json], key: str) -> torch.Tensor:
    import torch

    forms = {(record["dtype"], tuple(record["shape"][1:]), len(record["shape"])) for record in records}
    if len(forms) != 1:
        raise _mixed(stored, key, [f"{record['dtype']} {record['shape']}" for record in records])
    parts = []
    for read in read_payloads(stored, records, keep=True):
        if read.problem is not None:
            raise ReadError(read.problem)
        dtype, shape = kind(read.record, f"{stored.url}: {read.record['name']!r}")
        parts.append(tensor_from_bytes(bytearray(read.data), dtype, shape or (1,)))
    return torch.cat(parts)


def _mixed(stored: Stored, key: str, forms: Sequence[str]) -> ReadError:
    shown = ", ".join(list(dict.fromkeys(forms))[:5])
    problem = f"has different forms in the run's steps ({shown})"
    return ReadError(f"{stored.url}: {key!r} {problem}; read it step by step, as step_<S>/{key}")
