"""The bytes of segments' data files: one slice by one request, what follows by fewer, many by whole files."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import BinaryIO
from weakref import WeakValueDictionary

import numpy as np

from tlcore.errors import BackendError, MissingError, ReadError
from tlcore.hotpath.hashing import hex_digests
from tlcore.hotpath.reading import Scratch, gather_ranges, hash_ranges
from tlcore.protocols import Buffer
from tlcore.storage import Store, SupportsBuffers, SupportsFiles

_MOST_OPEN = 16
_MOST_WHOLE = 2
# Each keeps its file open, of which a process may have few.
_MOST_MAPS = 256
# A request takes as long as this many bytes do, so they are asked for along with a small slice.
_ALONG_BYTES = 256 << 10
# On a disk of this machine, what lies between two slices is rather read than left out, up to so many bytes.
_LOCAL_ALONG_BYTES = 16 << 10
_AHEAD_BYTES = 64 << 20
_LARGE_BYTES = 4 << 20
# More is read into memory of its own, of which no more is touched than there are bytes.
_LARGEST_RUN = 16 << 20
_LARGEST_WHOLE = 1 << 30
# What a core's own cache holds: hashing then finds there what was just read.
_SCRATCH_BYTES = 256 << 10


class SegmentFiles:
    """Ranges of the files of a store, read by several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._is_local = isinstance(store, SupportsFiles)
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        # For as long as somebody looks at one.
        self._maps: WeakValueDictionary[str, mmap.mmap] = WeakValueDictionary()
        self._whole: OrderedDict[str, _Whole] = OrderedDict()
        self._ahead: tuple[str, int, Buffer] = ("", 0, b"")
        self._last: tuple[str, int] = ("", 0)
        self._scratch = Scratch()
        self._lock = threading.Lock()

    def read(self, name: str, begin: int, end: int, array_end: int) -> Buffer:
        """The bytes ``[begin, end)`` of a file. Who goes on behind them has what follows up to ``array_end``.

        Raises MissingError or ReadError, also where the file ends before ``end``.
        """
        if end <= begin:
            return b""
        if self._is_local:
            return self._pread(name, begin, end)
        with self._lock:
            known, first, data = self._ahead
            goes_on = self._last == (name, begin)
            self._last = name, end
            if known == name and first <= begin and end <= first + len(data):
                return memoryview(data)[begin - first : end - first]
        # One who reads two slices that touch wants the others as well, unless they are large.
        far = begin + _AHEAD_BYTES if goes_on else begin + _ALONG_BYTES
        if end - begin >= _LARGE_BYTES:
            far = end
        until = max(end, min(far, array_end))
        found = self._get(name, begin, until)
        if len(found) < end - begin:
            raise ReadError(f"{self._store.url}/{name}: ends too early, {len(found)} bytes at {begin}")
        if until > end:
            with self._lock:
                self._ahead = name, begin, found
        return memoryview(found)[: end - begin]

    def read_many(self, name: str, size: int, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Several ranges of a file of ``size`` bytes; those near each other, as of one array, by one read.

        A remote file is read as a whole, once, where that takes less than a request for each of them.
        """
        if len(ranges) == 1:
            return [self.read(name, begin, end, end) for begin, end in ranges]
        along = _LOCAL_ALONG_BYTES if self._is_local else _ALONG_BYTES
        runs = list(_near(sorted(set(ranges)), along))
        if self._is_local or size > _LARGEST_WHOLE or not self._wants_whole(name, size, runs):
            return self._read_runs(name, ranges, runs)
        data = self._whole_file(name, size)
        for begin, end in ranges:
            if not 0 <= begin <= end <= len(data):
                raise ReadError(f"{self._store.url}/{name}: ends too early, it has {len(data)} bytes")
        view = memoryview(data)
        return [view[begin:end] for begin, end in ranges]

    def _wants_whole(self, name: str, size: int, runs: Sequence[Sequence[tuple[int, int]]]) -> bool:
        with self._lock:
            if name in self._whole:
                return True
        wanted = sum(_ALONG_BYTES + run[-1][1] - run[0][0] for run in runs)
        return wanted >= size

    def _read_runs(
        self, name: str, ranges: Sequence[tuple[int, int]], runs: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Buffer]:
        found: dict[tuple[int, int], Buffer] = {}
        for run in runs:
            first = run[0][0]
            data = self._read_run(name, first, run[-1][1])
            for begin, end in run:
                found[begin, end] = data[begin - first : end - first]
        return [found[each] for each in ranges]

    def _read_run(self, name: str, begin: int, end: int) -> memoryview:
        """The bytes ``[begin, end)`` of a file; of a local one in memory that is used again."""
        if not self._is_local or not 0 < end - begin <= _LARGEST_RUN:
            return memoryview(self.read(name, begin, end, end))
        memory = memoryview(self._scratch.take(end - begin))[: end - begin]
        self.read_into(name, begin, memory)
        return memory.toreadonly()

    def hash_many(self, wanted: Sequence[tuple[str, np.ndarray]]) -> list[bytes | ReadError]:
        """The XXH3-128 of ascending ranges ``[n, 2]`` of files, 16 bytes each, up to one that is not there.

        Of a file that is missing or cannot be read, the error.
        """
        if len(wanted) > 1 and self._is_local:
            with suppress(MissingError, ReadError):
                return list(self._hash_local(wanted))
        # One that is wrong must not cost the others.
        return [self._hash_one(name, ranges) for name, ranges in wanted]

    def _hash_one(self, name: str, ranges: np.ndarray) -> bytes | ReadError:
        try:
            return (
                self._hash_local([(name, ranges)])[0] if self._is_local else self._hash_remote(name, ranges)
            )
        except ReadError as error:
            return error

    def _hash_local(self, wanted: Sequence[tuple[str, np.ndarray]]) -> Sequence[bytes]:
        store, name = self._store, ""
        assert isinstance(store, SupportsFiles)
        try:
            with ExitStack() as stack:
                listed: list[tuple[int, int]] = []
                parts: list[np.ndarray] = []
                for name, ranges in wanted:
                    handle = stack.enter_context(store.open_file(name)).fileno()
                    behind = np.flatnonzero(ranges[:, 1] > os.fstat(handle).st_size)
                    # No memory is taken for a range that is not there.
                    parts.append(ranges[: int(behind[0])] if len(behind) else ranges)
                    listed.append((handle, len(parts[-1])))
                there = np.concatenate(parts)
                room = max(_SCRATCH_BYTES, _largest(there))
                with memoryview(self._scratch.take(room)) as memory:
                    return hash_ranges(np.array(listed, np.int64), there, memory[:room])
        except FileNotFoundError:
            raise MissingError(f"{store.url}: no file {name!r}") from None
        except (BackendError, OSError, MemoryError) as error:
            raise ReadError(f"{store.url}/{name}: cannot be read: {error}") from error

    def gather(self, name: str, ranges: np.ndarray, target: memoryview) -> bytes:
        """Read ranges ``[n, 3]`` of a local file to their places; the XXH3-128 of each, 16 bytes each.

        A place of -1 is none. Ends before the first that is not there. Raises MissingError or ReadError.
        """
        with self._lock:
            # Under the lock: nobody may close it meanwhile.
            file = self._opened(name)
            return gather_ranges(file.fileno(), np.ascontiguousarray(ranges), target)

    def _hash_remote(self, name: str, ranges: np.ndarray) -> bytes:
        if not len(ranges):
            return b""
        begin, end = int(ranges[0, 0]), int(ranges[:, 1].max())
        data = memoryview(self._get(name, begin, end))
        pairs = (ranges - begin).tolist()
        there = list(itertools.takewhile(lambda pair: pair[1] <= len(data), pairs))
        return bytes.fromhex("".join(hex_digests([data[first:last] for first, last in there])))

    def close(self) -> None:
        """Close files, and forget what was read ahead."""
        with self._lock:
            files = list(self._open.values())
            self._open.clear()
            self._whole.clear()
            self._ahead = ("", 0, b"")
        for file in files:
            file.close()

    def _whole_file(self, name: str, size: int) -> Buffer:
        with self._lock:
            whole = self._whole.get(name)
            if whole is None:
                whole = self._whole[name] = _Whole(lambda: self._get(name, 0, size))
                while len(self._whole) > _MOST_WHOLE:
                    self._whole.popitem(last=False)
        return whole.data()

    def _get(self, name: str, begin: int, end: int) -> Buffer:
        store = self._store
        try:
            if isinstance(store, SupportsBuffers):
                return store.get_buffer(name, begin, end)
            return store.get(name, begin, end)
        except FileNotFoundError:
            raise MissingError(f"{self._store.url}: no file {name!r}") from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        except (MemoryError, OverflowError):
            raise ReadError(f"{self._store.url}/{name}: larger than this machine's memory") from None

    def read_into(self, name: str, begin: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of a file from ``begin`` on. Raises as `read` does."""
        if not self._is_local:
            target[:] = self.read(name, begin, begin + len(target), begin + len(target))
            return
        done = 0
        with self._lock:
            file = self._opened(name)
            try:
                # Under the lock: nobody may close it meanwhile. The bytes mostly come from the page cache.
                while done < len(target) and (
                    count := os.preadv(file.fileno(), [target[done:]], begin + done)
                ):
                    done += count
            except OSError as error:
                raise ReadError(f"{self._store.url}/{name}: cannot be read: {error}") from error
        if done < len(target):
            raise ReadError(f"{self._store.url}/{name}: ends too early, {done} bytes at {begin}")

    def mapped(self, name: str) -> memoryview | None:
        """A local file in memory, to be copied from by the system alone: it may be cut off by others.

        None where the store has no files, or too many are in memory. Raises MissingError or ReadError, also
        where it was cut off since it was asked for first.
        """
        if not self._is_local:
            return None
        with self._lock:
            known = self._maps.get(name)
            if known is None:
                if len(self._maps) >= _MOST_MAPS:
                    return None
                file = self._opened(name)
                try:
                    known = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise ReadError(f"{self._store.url}/{name}: cannot be read: {error}") from error
                self._maps[name] = known
            if known.size() < len(known):
                raise ReadError(f"{self._store.url}/{name}: was cut off while it was read")
            return memoryview(known)

    def _pread(self, name: str, begin: int, end: int) -> Buffer:
        with self._lock:
            file = self._opened(name)
            try:
                # Under the lock: nobody may close it meanwhile. The bytes mostly come from the page cache.
                data = os.pread(file.fileno(), end - begin, begin)
                while len(data) < end - begin and (
                    more := os.pread(file.fileno(), end - begin - len(data), begin + len(data))
                ):
                    data += more
            except (OSError, MemoryError, OverflowError) as error:
                raise ReadError(f"{self._store.url}/{name}: cannot be read: {error}") from error
        if len(data) < end - begin:
            raise ReadError(f"{self._store.url}/{name}: ends too early, {len(data)} bytes at {begin}")
        return data

    def _opened(self, name: str) -> BinaryIO:
        file = self._open.get(name)
        if file is not None:
            self._open.move_to_end(name)
            return file
        store = self._store
        assert isinstance(store, SupportsFiles)
        try:
            file = store.open_file(name)
        except FileNotFoundError:
            raise MissingError(f"{self._store.url}: no file {name!r}") from None
        except (BackendError, OSError) as error:
            raise ReadError(str(error)) from error
        self._open[name] = file
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return file


def _near(ranges: Sequence[tuple[int, int]], gap: int) -> Iterator[list[tuple[int, int]]]:
    """Ascending ranges, together where at most ``gap`` bytes lie between one and the next."""
    run: list[tuple[int, int]] = []
    for each in ranges:
        if run and (not 0 <= each[0] - run[-1][1] <= gap or each[1] - run[0][0] > _AHEAD_BYTES):
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _largest(ranges: np.ndarray) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).max(initial=0))


class _Whole:
    """A file that the first who asks reads, while the others wait."""

    def __init__(self, read: Callable[[], Buffer]) -> None:
        self._read = read
        self._data: Buffer | None = None
        self._lock = threading.Lock()

    def data(self) -> Buffer:
        """The file's bytes. Raises as reading does."""
        with self._lock:
            if self._data is None:
                self._data = self._read()
            return self._data
