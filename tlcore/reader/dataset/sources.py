"""Where rows of tensors lie: in arrays of many steps, in one step's tensor, or where only the whole is."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...alike import SupportsBegins
from ...errors import ReadError
from ...hotpath.reading import Scratch
from ...layout.dtypes import item_size
from ...layout.grids import as_rows
from ...layout.names import step_dir
from ...layout.row_scale import is_scaled, presented, restored
from ...protocols import Array, ArrayRows, Buffer
from ...record import Json
from ..placements import is_part
from ..tensor_bytes import payload
from .tokens import Numbers
from .wanted import Entry

if TYPE_CHECKING:
    from ..run import Run


def row_form(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape of one row of a tensor whose positions lie along ``axis`` (`tlcore.layout.rows.as_rows`)."""
    return (
        tuple(shape[1:]) if axis == 0 else tuple(each for at, each in enumerate(shape[1:], 1) if at != axis)
    )


class Packed(NamedTuple):
    """Rows with a scale (`layout.row_scale`): the dtype that they stand for, and their length as stored."""

    dtype: str
    width: int

    @classmethod
    def of(cls, record: Json) -> Packed | None:
        """What a record's rows are; None where they have no scale."""
        return cls(str(record["converted_from"]), int(record["shape"][-1])) if is_scaled(record) else None

    def restored(self, data: Buffer) -> Buffer:
        """The bytes of the values."""
        import torch

        own = bytearray(data) if memoryview(data).readonly else data
        return payload(restored(torch.frombuffer(own, dtype=torch.int8).view(-1, self.width), self.dtype))


class _InArray(NamedTuple):
    """An array by its number among the rank's; ``unit`` is how many bytes one of its rows has.

    ``nbytes`` tells it from one that has its number since other files are there. Where its rows have a scale,
    ``packed`` is the dtype that they are of.
    """

    rank: int
    number: int
    row_bytes: int
    unit: int
    nbytes: int
    packed: Packed | None = None


class _InRecord(NamedTuple):
    """A step's tensor, whose rows follow one another."""

    record: Json
    row_bytes: int
    packed: Packed | None = None


class _Whole(NamedTuple):
    """A step's tensor that is read as a whole: its rows do not follow one another, or ranks hold parts."""

    step: int
    name: str
    axis: int
    row_bytes: int
    packed: None = None


def _arrays_of(run: Run, rank: int, keys: Sequence[str]) -> dict[str, list[Array]]:
    """The arrays of some tensors, in the order of their segments, which are gone through once."""
    found: dict[str, list[Array]] = {key: [] for key in keys}
    for array in run.stored.arrays(rank, set(keys)):
        found[array.key].append(array)
    return found


def _begins(rows: Sequence[ArrayRows]) -> Mapping[int, int]:
    """The first row of each step."""
    return rows.begins() if isinstance(rows, SupportsBegins) else {each.step: each.begin for each in rows}


def _row_bytes(record: Json, axis: int) -> int:
    return prod(row_form(record["shape"], axis)) * (item_size(record["dtype"]) or 0)


class _Opened(NamedTuple):
    """A run as one process has opened it, and its arrays by rank and number; one thread looks these up."""

    run: Run
    pid: int
    arrays: dict[tuple[int, int], Array]
    lock: threading.Lock


class _ArrayRows(NamedTuple):
    """Where the tensors of an array's steps begin in it.

    ``rows_each`` is how many rows one of the array's own stands for.
    """

    source: int
    rows_each: int
    begins: Mapping[int, int]


class Sources:
    """The places that a run's rows lie in, by number.

    Goes into other processes, where the run is opened again: no connection may cross a fork.
    """

    def __init__(self, run: Run) -> None:
        self._opened: _Opened | None = _Opened(run, os.getpid(), {}, threading.Lock())
        self._opened_as = run.opened_as
        self.url = run.url
        self._has_arrays = run.stored.has_arrays
        self._is_local = run.stored.is_local
        self._sources: list[_InArray | _InRecord | _Whole] = []
        self._located: dict[tuple[int, str], list[_ArrayRows]] = {}
        self._expected: dict[tuple[int, str], list[Array]] = {}
        self._keys: dict[int, list[str]] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._scratch = Scratch()

    @property
    def is_local(self) -> bool:
        """Whether the run lies on a disk of this machine."""
        return self._is_local

    def of_several(self, steps: Sequence[int], entry: Entry) -> tuple[Numbers, Numbers]:
        """What `of` says of each of several steps, of an entry whose positions come first."""
        for source, rows_each, begins in self._located.get((int(entry.record["rank"]), entry.key), ()):
            # Those that are asked for together mostly lie in one array.
            found = [begins.get(step, -1) for step in steps]
            if min(found) >= 0:
                return np.full(len(steps), source), np.array(found, np.int64) * rows_each
        pairs = [self.of(step, entry, 0) for step in steps]
        sources, firsts = np.array(pairs, np.int64).T
        return sources, firsts

    def of(self, step: int, entry: Entry, axis: int) -> tuple[int, int]:
        """The source of an entry's rows in a step, and the row there that is its first. Raises ReadError."""
        record = entry.record
        plain = axis != 2 and "part" not in record and not is_part(record)
        # A scale is that of values along the last dimension, which positions do not share.
        plain = plain and not (is_scaled(record) and axis == len(record["shape"]) - 1)
        if plain and self._has_arrays:
            found = self._in_array(step, entry, axis)
            if found is not None:
                return found
        name = f"{step_dir(step)}/{entry.key}"
        if not plain:
            row_bytes = _row_bytes(presented(record), axis)
            return self._append(_Whole(step, name, axis, row_bytes)), 0
        if name != record["name"]:
            record = self.run().step(step).record(name)
        kept = {key: value for key, value in record.items() if key not in ("hash", "path", "module")}
        return self._append(_InRecord(kept, _row_bytes(record, axis), Packed.of(record))), 0

    def expect(self, entries: Sequence[Entry]) -> None:
        """Entries are asked for next: the arrays of all their tensors are looked up at once."""
        wanted: dict[int, list[str]] = {}
        for entry in entries if self._has_arrays else ():
            own = int(entry.record["rank"]), entry.key
            if own not in self._located and own not in self._expected:
                wanted.setdefault(own[0], []).append(own[1])
        for rank, keys in wanted.items():
            arrays = _arrays_of(self.run(), rank, keys)
            self._expected.update({(rank, key): found for key, found in arrays.items()})

    def _append(self, source: _InArray | _InRecord | _Whole) -> int:
        self._sources.append(source)
        return len(self._sources) - 1

    def _in_array(self, step: int, entry: Entry, axis: int) -> tuple[int, int] | None:
        own = int(entry.record["rank"]), entry.key
        if own not in self._located:
            self._locate(*own, entry.record, axis)
        for source, rows_each, begins in self._located[own]:
            begin = begins.get(step)
            if begin is not None:
                return source, begin * rows_each
        return None

    def _locate(self, rank: int, key: str, record: Json, axis: int) -> None:
        """Note the arrays of a tensor. The rows of each are asked for once, and not kept."""
        run, found = self.run(), self._located.setdefault((rank, key), [])
        width = item_size(record["dtype"]) or 0
        row_bytes = _row_bytes(record, axis)
        expected = self._expected.pop((rank, key), None)
        for number, array in enumerate(run.stored.arrays(rank, {key}) if expected is None else expected):
            self._counts[rank, key] = number + 1
            unit = prod(array.shape[1:]) * width
            if not row_bytes or unit % row_bytes:
                # Rows of another form, which are refused where they are met.
                continue
            nbytes = unit * array.shape[0]
            own = self._number(rank, key, number)
            place = _InArray(rank, own, row_bytes, unit, nbytes, Packed.of(record))
            source = self._append(place)
            found.append(_ArrayRows(source, unit // row_bytes, _begins(array.rows)))

    def _number(self, rank: int, key: str, number: int) -> int:
        keys = self._keys.setdefault(rank, [])
        if key not in keys:
            keys.append(key)
        return keys.index(key) << 32 | number

    def forget_steps(self) -> None:
        """Let go of what only the pass over the steps needed."""
        self._located.clear()
        self._expected.clear()

    def run(self) -> Run:
        """The run, opened anew in each process. Raises ReadError where it cannot be."""
        return self._here().run

    def _here(self) -> _Opened:
        # What threads that come together open goes by one name, so that each of them has a whole one.
        opened = self._opened
        if opened is not None and opened.pid == os.getpid():
            return opened
        if opened is not None and not self._is_local:
            raise ReadError(
                f"{self.url}: a run at a URL is not read in a forked process;"
                ' give the DataLoader multiprocessing_context="spawn"'
            )
        if self._opened_as is None:
            raise ReadError(f"{self.url}: it was not opened by open_run, so no other process can open it")
        from ..runs import open_run

        opened = self._opened = _Opened(open_run(*self._opened_as), os.getpid(), {}, threading.Lock())
        return opened

    def read(self, source: int, begin: int, end: int, memory: memoryview | None = None) -> Buffer:
        """The bytes of rows ``[begin, end)`` of a source. Raises MissingError or ReadError.

        They lie in ``memory``, of their size, where they could be read right into it, or they may lie in
        memory that this thread's next reading has again, unless they are still looked at.
        """
        place, opened = self._sources[source], self._here()
        run = opened.run
        first, last = begin * place.row_bytes, end * place.row_bytes
        if isinstance(place, _InRecord):
            data = run.stored.read_range(place.record, first, last)
        elif isinstance(place, _Whole):
            tensor = run.step(place.step).tensor(place.name, unshard=True)
            data = payload(as_rows(tensor, place.axis)[begin:end])
        else:
            into = memory if place.packed is None else None
            data = self._of_array(opened, place, first, last, into)
        size = memoryview(data).nbytes
        if size != last - first:
            raise ReadError(f"{self.url}: source of rows ends too early, {size} bytes of {last - first}")
        return data if place.packed is None or not size else place.packed.restored(data)

    def _of_array(
        self, opened: _Opened, place: _InArray, first: int, last: int, memory: memoryview | None
    ) -> Buffer:
        run, array, unit = opened.run, self._array(opened, place), place.unit
        begin, end = first // unit, -(-last // unit)
        size = (end - begin) * unit
        if size != last - first or memory is None:
            memory = memoryview(self._scratch.take(size))[:size] if self._is_local else None
        data = None if memory is None else run.stored.read_array_into(array, begin, memory)
        if data is None:
            data = run.stored.read_array(array, begin, end)
        if size == last - first:
            return data
        return memoryview(data).cast("B")[first % unit :][: last - first]

    def maps(self) -> list[memoryview] | None:
        """Of each source the bytes of its rows, for the system to copy from: nobody else may look there.

        None where one of them does not lie so. Raises MissingError or ReadError.
        """
        opened, found = self._here(), []
        for place in self._sources:
            if not isinstance(place, _InArray) or place.packed is not None:
                return None
            array = self._array(opened, place)
            view = opened.run.stored.map_array(array)
            if view is None:
                return None
            found.append(view)
        return found

    def row_bytes(self, source: int) -> int:
        """How many bytes a row has."""
        return self._sources[source].row_bytes

    def _array(self, opened: _Opened, place: _InArray) -> Array:
        with opened.lock:
            return self._find_array(opened, place)

    def _find_array(self, opened: _Opened, place: _InArray) -> Array:
        known = opened.arrays.get((place.rank, place.number))
        if known is None:
            fewer, keys = False, self._keys[place.rank]
            arrays = _arrays_of(opened.run, place.rank, keys)
            for at, key in enumerate(keys):
                fewer |= len(arrays[key]) < self._counts[place.rank, key]
                opened.arrays.update(
                    {(place.rank, at << 32 | number): each for number, each in enumerate(arrays[key])}
                )
            known = None if fewer else opened.arrays.get((place.rank, place.number))
        # A run that grows has more behind those that it had.
        if known is None or known.shape[0] * place.unit != place.nbytes:
            opened.arrays.clear()
            raise ReadError(f"{self.url}: the run has changed since the data set was made of it")
        return known

    def __getstate__(self) -> Mapping[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key != "_scratch"}
        return {**own, "_opened": None, "_located": {}, "_expected": {}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._scratch = Scratch()
