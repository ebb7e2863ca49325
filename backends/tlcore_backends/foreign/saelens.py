"""Activations that SAELens caches: a data set of `datasets` on disk, a row for each sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tlcore.errors import MissingError, ReadError
from tlcore.layout.dtypes import item_size
from tlcore.protocols import StepRanks
from tlcore.record import Json

from .arrow import Column, ColumnAt, Rows, Span, read_stream
from .documents import Found
from .files import DumpFiles, StoredAt, shown_path
from .source import ONE_RANK, ForeignSource

_INFO, _STATE = "dataset_info.json", "state.json"
_TOKENS = "token_ids"
_CONFIGURATION = "cache_activations_runner_cfg.json"
_SHARDS, _SETS = ".tmp_shards", "dataset_dict.json"
_FLOATS = ("float16", "float32", "float64")
_MOST_EXTENT = 1 << 31
_KEPT = 4
IntArray: TypeAlias = npt.NDArray[np.int64]


class _Batch(NamedTuple):
    file: str
    rows: Rows


class Saelens(ForeignSource):
    """Each sequence is a step and a request: its tokens, and the activations at the hook, whose name the
    module has."""

    tool = "saelens"

    @classmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """A data set on disk that has a column [context, width] of floats."""
        if _INFO not in files.top and _STATE not in files.top:
            return _elsewhere(files)
        names = _data_files(files)
        if isinstance(names, str):
            return names
        try:
            columns, _ = read_stream(files, names[0], files.top[names[0]])
        except ReadError as error:
            return str(error)
        if not any(map(_is_activations, columns)):
            listed = ", ".join(each.name for each in columns)
            return f"{names[0]}: no column has activations [context, width], there are {listed}"
        return {"world_size": 1}

    @cached_property
    def _data(self) -> tuple[list[Column], list[_Batch], list[int]]:
        """The columns, the batches, and with which row each of them ends."""
        names = _data_files(self.files)
        if isinstance(names, str):
            raise ReadError(f"{self.files.url}: {names}")
        columns: list[Column] = []
        batches: list[_Batch] = []
        for name in names:
            found, rows = read_stream(self.files, name, self.files.top[name])
            if columns and found != columns:
                raise ReadError(f"{shown_path(self.files, name)}: its columns are not those of {names[0]}")
            columns = found
            batches += [_Batch(name, each) for each in rows if each.number]
        return columns, batches, list(accumulate(each.rows.number for each in batches))

    @cached_property
    def steps(self) -> Mapping[int, StepRanks]:
        """The rows."""
        ends = self._data[2]
        return dict.fromkeys(range(ends[-1] if ends else 0), ONE_RANK)

    def found(self, step: int, rank: int) -> list[Found]:
        """The tokens, as the model's argument, and the hooks' activations."""
        columns, batches, ends = self._data
        place = bisect_right(ends, step)
        batch = batches[place]
        row = step - (ends[place] - batch.rows.number)
        tokens, states = [], []
        for column in columns:
            held = batch.rows.columns.get(column.name)
            if held is not None and column.name == _TOKENS and len(column.sizes) == 1:
                at = self._at(batch.file, column, held, row)
                tokens.append(Found("", "inputs", ("input_ids",), at.dtype, at.shape, at.place()))
            elif held is not None and _is_activations(column):
                at = self._at(batch.file, column, held, row)
                states.append(Found(column.name, "outputs", (), at.dtype, at.shape, at.place()))
        return [*tokens, *states]

    def rows(self, step: int, rank: int) -> Sequence[Json]:
        """All of a sequence, from its first position on: what came before a slice of it is not told."""
        return self._rows(step, self.found(step, rank))

    def rows_with(self, step: int, rank: int, found: Sequence[Found]) -> Sequence[Json]:
        """The same."""
        return self._rows(step, found)

    def _rows(self, step: int, found: Sequence[Found]) -> list[Json]:
        row = {"request_id": str(step), "external_request_id": str(step)}
        count = found[0].shape[0] if found else 0
        return [{**row, "first_row": 0, "rows": count, "first_position": 0}]

    def _at(self, file: str, column: Column, held: ColumnAt, row: int) -> StoredAt:
        """Where one row of a column lies, whose lists must all be of one size."""
        where = f"{shown_path(self.files, file)}: row {row} of {column.name!r}"
        if held.nulls:
            raise ReadError(f"{where}: has missing values")
        begin, count = row, 1
        shape: list[int] = []
        for fixed, offsets in zip(column.sizes, held.offsets, strict=True):
            if offsets is None:
                size = fixed or 0
            else:
                begin, size = self._lists(file, offsets, begin, count, where)
            shape.append(size)
            begin, count = (begin * size if offsets is None else begin), count * size
        width = item_size(column.dtype or "") or 1
        if not all(0 <= each < _MOST_EXTENT for each in shape):
            raise ReadError(f"{where}: a size makes no sense")
        if begin < 0 or (begin + prod(shape)) * width > held.values.size:
            raise ReadError(f"{where}: leads out of the file")
        return StoredAt(file, held.values.at + begin * width, column.dtype or "", tuple(shape))

    def _lists(self, file: str, offsets: Span, begin: int, count: int, where: str) -> tuple[int, int]:
        """Where ``count`` lists from the one of number ``begin`` on begin, and how long each is."""
        if begin < 0 or count > _MOST_EXTENT or (begin + count + 1) * 4 > offsets.size:
            raise ReadError(f"{where}: leads out of the file")
        values = self._offsets(file, offsets)[begin : begin + count + 1]
        sizes = np.diff(values)
        size = int(sizes[0]) if count else 0
        if size < 0 or (sizes != size).any():
            raise ReadError(f"{where}: its lists are not all of one length")
        return int(values[0]), size

    def _offsets(self, file: str, span: Span) -> IntArray:
        """All offsets of a batch, which its next rows need, too."""
        found = self._known.get((file, span))
        if found is None:
            data = self.files.read(file, span.at, span.at + span.size // 4 * 4)
            found = np.frombuffer(data, np.dtype("<i4")).astype(np.int64)
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)), None)
            self._known[file, span] = found
        return found

    @cached_property
    def _known(self) -> dict[tuple[str, Span], IntArray]:
        return {}


def _elsewhere(files: DumpFiles) -> str | None:
    """What to do where data sets lie in a place, or one that is packed otherwise; None for anything else."""
    if _SHARDS in files.directories:
        shards = sorted(files.directories_in(_SHARDS))
        return f"has {_SHARDS} of a caching by SAELens that did not end" + (
            f": open {shards[0]}" + (", or one of the others" if len(shards) > 1 else "") if shards else ""
        )
    if _SETS in files.top:
        held = sorted(name for name in files.directories if f"{name}/{_STATE}" in files.files_in(name))
        return f"{_SETS}: is of several data sets: open one of them ({', '.join(held) or 'there is none'})"
    tables = [name for name in files.top if name.endswith(".parquet")]
    if not tables and "data" in files.directories:
        # As the Hub has it.
        tables = [name for name in files.files_in("data") if name.endswith(".parquet")]
    if not tables and _CONFIGURATION not in files.top:
        return None
    return f"{min(tables, default=_CONFIGURATION)}: Parquet is not read; load it and use save_to_disk"


def _data_files(files: DumpFiles) -> list[str] | str:
    """The files of a data set in order, or what is missing."""
    for name, other in ((_STATE, _INFO), (_INFO, _STATE)):
        if name not in files.top:
            return f"has {other} of a data set on disk, but no {name}"
    try:
        state: Any = files.json(_STATE)
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (TypeError, KeyError, MissingError):
        return f"{_STATE}: has no _data_files, as that of a data set has"
    if lacking := next((each for each in names if each not in files.top), None):
        return f"{_STATE}: names {lacking}, which is missing"
    return names or f"{_STATE}: the data set is empty"


def _is_activations(column: Column) -> bool:
    return column.dtype in _FLOATS and len(column.sizes) == 2
