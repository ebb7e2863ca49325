"""Where rows of tensors lie: in arrays of many steps, in one step's tensor, or where only the whole is."""

from __future__ import annotations

import os
import threading
from array import array as numbers
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
from ...layout.row_scale import is_scaled, presented
from ...protocols import Array, ArrayRows, Buffer
from ...record import Json
from ..alike import AlikeTensors
from ..placements import is_part
from ..tensor_bytes import payload
from .places import Bytes, InArray, InRecord, Packed, Place, Whole, row_bytes
from .tokens import Numbers
from .wanted import Entry

if TYPE_CHECKING:
    from ..run import Run


def _arrays_of(run: Run, rank: int, keys: Sequence[str]) -> dict[str, list[Array]]:
    """The arrays of some tensors, in the order of their segments, which are gone through once."""
    found: dict[str, list[Array]] = {key: [] for key in keys}
    for array in run.stored.arrays(rank, set(keys)):
        found[array.key].append(array)
    return found


def _begins(rows: Sequence[ArrayRows]) -> Mapping[int, int]:
    """The first row of each step."""
    return rows.begins() if isinstance(rows, SupportsBegins) else {each.step: each.begin for each in rows}


def _in_record(record: Json, axis: int) -> InRecord:
    kept = {key: value for key, value in record.items() if key not in ("hash", "path", "module")}
    return InRecord(kept, row_bytes(record, axis), Packed.of(record))


class _Opened(NamedTuple):
    """A run as one process has opened it, and its arrays by rank and number; one thread looks these up."""

    run: Run
    pid: int
    arrays: dict[tuple[int, int], Array]
    lock: threading.Lock
    alike: AlikeTensors

    @classmethod
    def here(cls, run: Run) -> _Opened:
        """A run that this process has opened."""
        return cls(run, os.getpid(), {}, threading.Lock(), AlikeTensors(run.stored))


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
        self._opened: _Opened | None = _Opened.here(run)
        self._opened_as = run.opened_as
        self.url = run.url
        self._has_arrays = run.stored.has_arrays
        self._is_local = run.stored.is_local
        self._places: list[Place] = []
        # Of each source its place by number, and the step: a run may have millions, of few places.
        self._place_of, self._step_of = numbers("q"), numbers("q")
        # The place of each tensor whose record serves for steps that are alike, with that record.
        self._shared: dict[tuple[int, int], tuple[int, Json]] = {}
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
        place = (
            None if self._has_arrays or not self._is_plain(entry.record, 0) else self._shared_place(entry, 0)
        )
        if place is not None:
            begin = len(self._step_of)
            self._place_of.extend([place] * len(steps))
            self._step_of.extend(steps)
            return np.arange(begin, len(self._step_of)), np.zeros(len(steps), np.int64)
        pairs = [self.of(step, entry, 0) for step in steps]
        sources, firsts = np.array(pairs, np.int64).T
        return sources, firsts

    def of(self, step: int, entry: Entry, axis: int) -> tuple[int, int]:
        """The source of an entry's rows in a step, and the row there that is its first. Raises ReadError."""
        record = entry.record
        plain = self._is_plain(record, axis)
        if plain and self._has_arrays:
            found = self._in_array(step, entry, axis)
            if found is not None:
                return found
        if not plain:
            return self._append(Whole(entry.key, axis, row_bytes(presented(record), axis)), step), 0
        place = self._shared_place(entry, axis)
        if place is not None:
            return self._append_to(place, step), 0
        name = f"{step_dir(step)}/{entry.key}"
        if name != record["name"]:
            record = self.run().step(step).record(name)
        return self._append(_in_record(record, axis), step), 0

    def _is_plain(self, record: Json, axis: int) -> bool:
        """Whether rows follow one another where a tensor's bytes lie."""
        plain = axis != 2 and "part" not in record and not is_part(record)
        # A scale is that of values along the last dimension, which positions do not share.
        return plain and not (is_scaled(record) and axis == len(record["shape"]) - 1)

    def _shared_place(self, entry: Entry, axis: int) -> int | None:
        """The place of an entry's tensor in steps that are alike; None where each step's record is needed."""
        if not self._here().alike.are_found:
            return None
        own = id(entry.record), axis
        known = self._shared.get(own)
        if known is None:
            self._places.append(_in_record(entry.record, axis))
            # The record is kept, so that no other one has its identity.
            known = self._shared[own] = len(self._places) - 1, entry.record
        return known[0]

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

    def _append(self, place: Place, step: int = -1) -> int:
        self._places.append(place)
        return self._append_to(len(self._places) - 1, step)

    def _append_to(self, place: int, step: int) -> int:
        self._place_of.append(place)
        self._step_of.append(step)
        return len(self._step_of) - 1

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
        own_bytes = row_bytes(record, axis)
        expected = self._expected.pop((rank, key), None)
        for number, array in enumerate(run.stored.arrays(rank, {key}) if expected is None else expected):
            self._counts[rank, key] = number + 1
            unit = prod(array.shape[1:]) * width
            if not own_bytes or unit % own_bytes:
                # Rows of another form, which are refused where they are met.
                continue
            nbytes = unit * array.shape[0]
            own = self._number(rank, key, number)
            source = self._append(InArray(rank, own, own_bytes, unit, nbytes, Packed.of(record)))
            found.append(_ArrayRows(source, unit // own_bytes, _begins(array.rows)))

    def _number(self, rank: int, key: str, number: int) -> int:
        keys = self._keys.setdefault(rank, [])
        if key not in keys:
            keys.append(key)
        return keys.index(key) << 32 | number

    def forget_steps(self) -> None:
        """Let go of what only the pass over the steps needed."""
        self._located.clear()
        self._expected.clear()
        self._shared.clear()

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

        opened = self._opened = _Opened.here(open_run(*self._opened_as))
        return opened

    def read(self, source: int, begin: int, end: int, memory: memoryview | None = None) -> Buffer:
        """The bytes of rows ``[begin, end)`` of a source. Raises MissingError or ReadError.

        They lie in ``memory``, of their size, where they could be read right into it, or they may lie in
        memory that this thread's next reading has again, unless they are still looked at.
        """
        place, opened = self._places[self._place_of[source]], self._here()
        run, step = opened.run, self._step_of[source]
        first, last = begin * place.row_bytes, end * place.row_bytes
        if isinstance(place, InRecord):
            data = run.stored.read_range(opened.alike.record_in(place.record, step), first, last)
        elif isinstance(place, Whole):
            tensor = run.step(step).tensor(f"{step_dir(step)}/{place.key}", unshard=True)
            data = payload(as_rows(tensor, place.axis)[begin:end])
        else:
            into = memory if place.packed is None else None
            data = self._of_array(opened, place, first, last, into)
        size = memoryview(data).nbytes
        if size != last - first:
            raise ReadError(f"{self.url}: source of rows ends too early, {size} bytes of {last - first}")
        return data if place.packed is None or not size else place.packed.restored(data)

    def _of_array(
        self, opened: _Opened, place: InArray, first: int, last: int, memory: memoryview | None
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

    def together(self, sources: Numbers) -> Numbers:
        """Of each source the number of the place whose tensors `read_rows` reads; -1 where it does not."""
        if not self._here().alike.are_read_together:
            return np.full(len(sources), -1)
        readable = np.array([isinstance(each, InRecord) for each in self._places], np.bool_)
        places = np.frombuffer(self._place_of, np.int64)[sources]
        return np.where(readable[places], places, -1)

    def read_rows(self, place: int, sources: Numbers, pieces: Numbers, target: Bytes) -> Numbers:
        """Put rows of several sources of a place into ``target`` (bytes, a row for each) in one call.

        ``pieces`` are ``[pieces, 4]``: the number of one in ``sources``, which ascends, its first row, the
        row of ``target`` that this becomes, and how many there are. Returns those that were not read.
        """
        own, alike = self._places[place], self._here().alike
        assert isinstance(own, InRecord)
        steps = np.frombuffer(self._step_of, np.int64)[sources].tolist()
        if own.packed is None:
            return np.flatnonzero(~alike.read_rows(own.record, steps, pieces, target))
        counts = pieces[:, 3]
        ends = np.cumsum(counts)
        apart, rows = pieces.copy(), np.empty((int(ends[-1]), own.row_bytes), np.uint8)
        apart[:, 2] = ends - counts
        read = alike.read_rows(own.record, steps, apart, rows)
        values = np.frombuffer(own.packed.restored(rows.reshape(-1).data), np.uint8).reshape(len(rows), -1)
        target[np.repeat(pieces[:, 2] - apart[:, 2], counts) + np.arange(len(rows))] = values
        return np.flatnonzero(~read)

    def maps(self) -> list[memoryview] | None:
        """Of each source the bytes of its rows, for the system to copy from: nobody else may look there.

        None where one of them does not lie so. Raises MissingError or ReadError.
        """
        opened, found = self._here(), []
        for place in map(self._places.__getitem__, self._place_of):
            if not isinstance(place, InArray) or place.packed is not None:
                return None
            array = self._array(opened, place)
            view = opened.run.stored.map_array(array)
            if view is None:
                return None
            found.append(view)
        return found

    def _array(self, opened: _Opened, place: InArray) -> Array:
        with opened.lock:
            return self._find_array(opened, place)

    def _find_array(self, opened: _Opened, place: InArray) -> Array:
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
