"""Reading runs of layout version 2: the steps that indexes commit, and slices of their arrays."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from tlcore.errors import MissingError, ReadError
from tlcore.layout.checksums import has_checksum
from tlcore.protocols import AlikeStep, Array, Buffer, Outline, StepKinds, StepRanks, WholeCheck
from tlcore.record import Json
from tlcore.storage import Store, SupportsFiles

from ..storage.threads import in_order
from .alike_steps import AlikeSteps
from .array_places import ArrayOfRows
from .hash_queue import HashQueue
from .index import SegmentIndex
from .index_reading import IndexReader
from .json_files import read_bytes
from .listing import Listing, list_segments
from .segment_check import segment_problems
from .segment_files import SegmentFiles
from .segment_names import IndexName, catalogue_name, is_data
from .whole_check import UnderWay, are_many, check_index

_MOST_INDEXES = 16
# Of the indexes that are kept, as they are stored: in memory they are about ten times as large.
_MOST_INDEX_BYTES = 4 << 20
_REMOTE_THREADS = 8
_LOCAL_THREADS = min(4, os.cpu_count() or 1)


class SegmentSource:
    """The segments of a run. Its steps are read from the names of the indexes alone."""

    def __init__(self, store: Store, run: Json) -> None:
        self._store = store
        self._run = run
        self._data = SegmentFiles(store)
        self._reader = IndexReader()
        self._listing: Listing | None = None
        self._listed: Mapping[str, int] | None = None
        self._indexes: OrderedDict[str, SegmentIndex] = OrderedDict()
        # Of each data file whose index was read, that, and which of its files it is.
        self._told_by: dict[str, tuple[SegmentIndex, int]] = {}
        self._unchecked: set[str] = set()
        # What is wrong with an index.
        self._damaged: dict[str, str] = {}
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}

    @property
    def _known(self) -> Listing:
        with self._lock:
            if self._listing is None:
                self._listing = list_segments(self._store, self._run)
            return self._listing

    def refresh(self) -> None:
        """See what was committed since."""
        found = list_segments(self._store, {})
        with self._lock:
            self._listing, self._listed = found, found.sizes
            self._damaged.clear()

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """Each committed step."""
        return self._known.steps

    def document(self, step: int, rank: int) -> Json:
        """What a rank has committed of a step. Raises MissingError or ReadError."""
        return self._index(step, rank).document(step)

    def outline(self, step: int, rank: int) -> Outline:
        """What a rank has committed of a step, but for its records. Raises MissingError or ReadError."""
        return self._index(step, rank).outline(step)

    def step_kinds(self, step: int, rank: int) -> StepKinds | None:
        """What a step's document consists of, which need not be made for that."""
        return self._index(step, rank).step_kinds(step)

    def kind(self, step: int, rank: int) -> Hashable | None:
        """Equal for steps whose documents are sound if that of one of them is."""
        return self._index(step, rank).kind(step)

    def _index(self, step: int, rank: int) -> SegmentIndex:
        name = self._known.find(step, rank)
        if name is None:
            raise MissingError(f"{self._store.url}: rank {rank} has not committed step {step}")
        known = self._kept(name.file)
        if known is not None:
            return known
        with self._lock:
            reading = self._reading.setdefault(name.file, threading.Lock())
        with reading:
            # Threads that come together have one: it takes long to read, and is large.
            known = self._kept(name.file)
            return self._read_and_keep(name) if known is None else known

    def _kept(self, file: str) -> SegmentIndex | None:
        with self._lock:
            index = self._indexes.get(file)
            if index is not None:
                self._indexes.move_to_end(file)
                return index
            damaged = self._damaged.get(file)
        if damaged is not None:
            # Of each of its steps the same is said, and it is not read for each.
            raise ReadError(damaged)
        return None

    def _read_and_keep(self, name: IndexName) -> SegmentIndex:
        try:
            index = self._read_index(name)
            with self._lock:
                self._indexes[name.file] = index
                self._told_by |= {file: (index, number) for number, (file, _) in enumerate(index.files)}
                self._forget_indexes()
            return index
        finally:
            # Only now: who comes between would read it again.
            with self._lock:
                self._reading.pop(name.file, None)

    def _forget_indexes(self) -> None:
        """Forget those that were not used for longest; who asks every rank for each step has all of these."""
        ranks = min(_MOST_INDEXES, len(self._listing.by_rank) if self._listing else 0)
        nbytes = sum(index.nbytes for index in self._indexes.values())
        while len(self._indexes) > _MOST_INDEXES or (
            nbytes > _MOST_INDEX_BYTES and len(self._indexes) > max(2, ranks)
        ):
            _, index = self._indexes.popitem(last=False)
            nbytes -= index.nbytes
            for file, _ in index.files:
                self._told_by.pop(file, None)

    def _read_index(self, name: IndexName) -> SegmentIndex:
        where = f"{self._store.url}/{name.file}"
        data = read_bytes(self._store, name.file)
        try:
            if not has_checksum(data, where):
                self._unchecked.add(name.file)
            read = self._reader.read(data, where)
            index = SegmentIndex(read.document, where, len(data), read.common)
            if index.rank != name.rank or index.steps != list(name.steps):
                raise index.damaged("it is not of the rank and steps that its name says")
            _ = index.files, index.heads
            self._reader.remember(read, index.places)
        except ReadError as error:
            with self._lock:
                self._damaged[name.file] = str(error)
            raise
        return index

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes ``[begin, end)`` of a tensor. Raises MissingError or ReadError."""
        file, first, last = self._range(record)
        until = last if end is None else min(last, first + end)
        return self._data.read(file, first + begin, until, self._array_end(file, first, last))

    def _range(self, record: Mapping[str, Any]) -> tuple[str, int, int]:
        file, offsets = record.get("shard"), record.get("offsets")
        if isinstance(file, str) and is_data(file) and isinstance(offsets, list) and len(offsets) == 2:
            first, last = offsets
            if type(first) is int and type(last) is int and 0 <= first <= last:
                return file, first, last
        raise ReadError(f"{self._store.url}: {record.get('name')!r} has no place in a segment")

    def _array_end(self, file: str, begin: int, end: int) -> int:
        index, number = self._told_by.get(file, (None, 0))
        if index is None:
            return end
        begins, size = index.places.begins.get(number, []), index.files[number][1]
        position = bisect_right(begins, begin)
        if position < len(begins):
            return begins[position]
        return size if begin < size else end

    def read_many(self, records: Sequence[Mapping[str, Any]]) -> list[Buffer | Exception]:
        """The bytes of each record, or why they cannot be read."""
        found: list[Buffer | Exception] = [b""] * len(records)
        by_file: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for position, record in enumerate(records):
            try:
                file, first, last = self._range(record)
                by_file[file].append((position, first, last))
            except ReadError as error:
                found[position] = error
        for file, ranges in by_file.items():
            try:
                size = self._size(file)
                parts = self._data.read_many(file, size, [(first, last) for _, first, last in ranges])
            except ReadError:
                # One that is wrong must not cost the others.
                parts = [self._one(file, first, last) for _, first, last in ranges]
            for (position, _, _), part in zip(ranges, parts, strict=True):
                found[position] = part
        return found

    def _one(self, file: str, begin: int, end: int) -> Any:
        try:
            return self._data.read(file, begin, end, end)
        except ReadError as error:
            return error

    def identity(self, record: Mapping[str, Any]) -> Hashable | None:
        """Equal for records whose bytes are the same slice."""
        try:
            return (*self._range(record), record["dtype"], tuple(record["shape"]))
        except (ReadError, KeyError, TypeError):
            return None

    def _size(self, file: str) -> int:
        size = self._known.sizes.get(file)
        if size is None:
            raise MissingError(f"{self._store.url}: no file {file!r}")
        return size

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the data file is there, in the size that the index says."""
        try:
            file, _, last = self._range(record)
            index, number = self._told_by.get(file, (None, 0))
            stated = self._size(file) if index is None else index.files[number][1]
            return last <= stated == self._sizes().get(file)
        except ReadError:
            return False

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with a data file is told once, by `problems`."""
        return None

    def advise(self, record: Mapping[str, Any]) -> None:
        """Slices are too small for it to matter."""

    def remains(self, step: int) -> Mapping[str, Json]:
        """Nothing: what no index commits belongs to no step that anybody could name."""
        return {}

    def problems(self, step: int, rank: int, document: Json, thorough: bool = True) -> Iterator[str]:
        """What is wrong with a step's arrays, or with its segment (told with the segment's first step)."""
        try:
            index = self._index(step, rank)
        except ReadError as error:
            yield str(error)
            return
        if step == index.steps[0]:
            yield from self._problems(index, thorough)

    def _problems(
        self, index: SegmentIndex, thorough: bool = True, without_heads: Collection[int] = ()
    ) -> Iterator[str]:
        sizes = self._sizes() if thorough else {}
        return segment_problems(self._store, index, sizes, thorough, without_heads)

    @property
    def unchecked(self) -> Collection[str]:
        """The indexes and catalogues read so far that have no checksum."""
        return {*self._unchecked, *self._known.unchecked}

    def whole_checks(self, rank: int) -> Iterator[WholeCheck]:
        """Checks of the rank's segments; the arrays of the next ones are read while one is looked at."""
        names = self._known.by_rank.get(rank, ())
        threads = _LOCAL_THREADS if isinstance(self._store, SupportsFiles) else None
        waiting: deque[UnderWay] = deque()
        count = max(self._threads, _LOCAL_THREADS)
        with ThreadPoolExecutor(count, "tlcore-read") as pool:
            queue = HashQueue(pool, count, self._data.hash_many)
            try:
                for index in in_order(partial(self._index_or_none, rank), names, self._threads):
                    if index is not None:
                        with suppress(ReadError):
                            problems = partial(self._problems, index, True)
                            check = check_index(index, queue.submit, problems, threads)
                            waiting.append(UnderWay.of(index, check))
                    while len(waiting) > (threads or 1) and are_many(waiting, _MOST_INDEX_BYTES):
                        yield waiting.popleft().check
                while waiting:
                    yield waiting.popleft().check
            finally:
                queue.cancel()

    def alike_steps(self, rank: int) -> Iterator[AlikeStep | int]:
        """A rank's steps in order, of a run on this machine; such as are like an earlier one as a whole."""
        alike = AlikeSteps(self._data.gather)
        for name in self._known.by_rank.get(rank, ()) if isinstance(self._store, SupportsFiles) else ():
            index = self._index_or_none(rank, name)
            if index is None or any(segment_problems(self._store, index, {}, thorough=False)):
                yield from name.steps
            else:
                yield from alike.of(index)

    def whole_files(self, rank: int) -> Iterator[str]:
        """A rank's data files, each index behind those that it tells of, then its catalogue."""
        for name in self._known.by_rank.get(rank, ()):
            yield from (file for file, _ in self._index(name.steps[0], rank).files)
            yield name.file
        if rank in self._known.ledgers:
            yield catalogue_name(rank)

    @property
    def extent(self) -> tuple[int, int]:
        """How many segments there are, and the bytes of their data files."""
        return sum(map(len, self._known.by_rank.values())), sum(self._known.sizes.values())

    def _index_or_none(self, rank: int, name: IndexName) -> SegmentIndex | None:
        with suppress(ReadError):
            return self._index(name.steps[0], rank)
        return None

    def _sizes(self) -> Mapping[str, int]:
        """The data files as they are, whatever a catalogue says of them."""
        with self._lock:
            if self._listed is None:
                self._listed = list_segments(self._store, {}).sizes
            return self._listed

    def ledger(self, rank: int) -> Json | None:
        """The ledger that the rank's last index, or its catalogue, has."""
        known = self._known
        ledger = known.ledgers.get(rank)
        indexes = known.by_rank.get(rank)
        if ledger is None and indexes:
            ledger = self._index(indexes[-1].steps[-1], rank).ledger
        return ledger if isinstance(ledger, dict) else None

    def arrays(self, rank: int, keys: Collection[str] | None = None) -> Iterator[Array]:
        """The arrays of a rank, segment by segment; several indexes are on their way at a time."""
        names = self._known.by_rank.get(rank, ())

        def read(name: IndexName) -> SegmentIndex:
            return self._index(name.steps[0], rank)

        for name, index in zip(names, in_order(read, names, self._threads), strict=True):
            yield from index.arrays(keys, partial(read, name))

    @property
    def _threads(self) -> int:
        """How many requests are on their way at a time."""
        return 1 if isinstance(self._store, SupportsFiles) else _REMOTE_THREADS

    def read_array(self, array: Array, begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of rows ``[begin, end)`` of an array of `arrays`. Raises MissingError or ReadError."""
        rows = array.rows
        if not isinstance(rows, ArrayOfRows):
            raise ReadError(f"{self._store.url}: {array.key!r} is no array of this run")
        total, width = array.shape[0], rows.place.row_bytes
        first, last = min(begin, total) * width, (total if end is None else min(end, total)) * width
        if rows.place.constant:
            # Stored once.
            once = self._data.read(rows.file, rows.place.begin, rows.end, rows.end)
            return memoryview(b"".join([once] * len(rows)))[first:last]
        offset = rows.place.begin
        return self._data.read(rows.file, offset + first, offset + last, offset + last)

    def read_array_into(self, array: Array, begin: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from row ``begin`` on. Raises MissingError or ReadError."""
        rows, width = array.rows, len(target)
        if not isinstance(rows, ArrayOfRows) or rows.place.constant:
            found = memoryview(self.read_array(array, begin)).cast("B")[:width]
            target[: len(found)] = found
            return len(found)
        first = begin * rows.place.row_bytes
        wanted = max(0, min(width, array.shape[0] * rows.place.row_bytes - first))
        self._data.read_into(rows.file, rows.place.begin + first, target[:wanted])
        return wanted

    def map_array(self, array: Array) -> memoryview | None:
        """The array's bytes in a map of their file; None of what is stored once, or elsewhere."""
        rows = array.rows
        if not isinstance(rows, ArrayOfRows) or rows.place.constant:
            return None
        whole = self._data.mapped(rows.file)
        found = None if whole is None else whole[rows.place.begin : rows.end]
        if found is not None and found.nbytes != rows.end - rows.place.begin:
            raise ReadError(f"{self._store.url}/{rows.file}: ends too early, it has {len(whole or ())} bytes")
        return found

    def close(self) -> None:
        """Close files."""
        self._data.close()
