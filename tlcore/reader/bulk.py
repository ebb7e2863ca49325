"""Many payloads, one after the other: read in large pieces by several threads, and hashed there.

Reading and hashing leave the interpreter free, so two threads on the local disk are enough to keep it
busy; a remote store answers many requests at a time.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import xxhash

from ..errors import ReadError
from ..record import Json
from .files import RunFiles, payload
from .slices import Slice

# What one thread takes at a time. A larger tensor is read alone.
_GROUP_BYTES = 8 << 20
_GROUP_RECORDS = 64
_LOCAL_THREADS = min(4, os.cpu_count() or 1)
_REMOTE_THREADS = 8
_LARGEST_FRAME = 1 << 20
_NOTHING = memoryview(b"")

_Range = tuple[str, int, int]


class Payload(NamedTuple):
    """A stored tensor's bytes and their xxh3-128 in hex, or ``problem``: why they could not be read.

    ``data`` is empty where only the hash was asked for.
    """

    record: Json
    data: memoryview
    digest: str = ""
    problem: str | None = None


def read_payloads(files: RunFiles, records: Sequence[Json], keep: bool) -> Iterator[Payload]:
    """The payloads of ``records`` (of a checked ``step.json``) in their order; never raises ReadError.

    Without ``keep`` only the hashes are returned, and bytes that several records share are read once.
    At most a few groups of 8 MiB, or of one larger tensor, are in memory.
    """
    reader = _Reader(files, keep)
    threads = _LOCAL_THREADS if files.is_local else _REMOTE_THREADS
    waiting: deque[Future[list[Payload]]] = deque()
    pool = ThreadPoolExecutor(threads, "tlcore-read")
    try:
        for group in _groups(records):
            waiting.append(pool.submit(reader.read, group))
            if len(waiting) > threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(records: Sequence[Json]) -> Iterator[Sequence[Json]]:
    begin, size = 0, 0
    for index, record in enumerate(records):
        if index > begin and (size + record["bytes"] > _GROUP_BYTES or index - begin >= _GROUP_RECORDS):
            yield records[begin:index]
            begin, size = index, 0
        size += record["bytes"]
    if begin < len(records):
        yield records[begin:]


class _Reader:
    """Reads groups of records; used by several threads."""

    def __init__(self, files: RunFiles, keep: bool) -> None:
        self._files = files
        self._keep = keep
        # Hashes by where the bytes lie: a range of a shard, or a file that may have several names.
        self._known: dict[Any, str] = {}

    def read(self, group: Sequence[Json]) -> list[Payload]:
        """The group's payloads in order."""
        ranges = {_range(record) for record in group if "file" not in record}
        shards = _read_ranges(self._files, ranges if self._keep else ranges - self._known.keys())
        return [self._payload(record, shards) for record in group]

    def _payload(self, record: Json, shards: Mapping[_Range | None, memoryview]) -> Payload:
        place = self._place(record)
        digest = self._known.get(place)
        if digest is not None and not self._keep:
            return Payload(record, _NOTHING, digest)
        try:
            data = self._from_file(record) if "file" in record else shards.get(_range(record))
            if data is None:
                # Not as this version writes it, or damaged: the careful way can tell, and says what is wrong.
                data = payload(self._files.stored(record))
        except ReadError as error:
            return Payload(record, _NOTHING, problem=str(error))
        digest = xxhash.xxh3_128_hexdigest(data)
        if place is not None:
            self._known[place] = digest
        return Payload(record, data if self._keep else _NOTHING, digest)

    def _place(self, record: Json) -> Any:
        """Equal for records that share stored bytes and mean the same by them; None if unknown."""
        if "file" not in record:
            return _range(record)
        blob = None if self._keep else self._files.identity(record["file"])
        return None if blob is None else (blob, record["dtype"], tuple(record["shape"]))

    def _from_file(self, record: Json) -> memoryview | None:
        """The payload of a ``.pt`` file that holds exactly what it should; else None."""
        file, size = record["file"], record.get("file_bytes")
        dtype = getattr(torch, record["dtype"], None)
        if not isinstance(dtype, torch.dtype) or size is None or size > record["bytes"] + _LARGEST_FRAME:
            return None
        if prod(record["shape"]) * dtype.itemsize != record["bytes"]:
            return None
        return _payload_in()(dtype, record["shape"], self._files.read(file, 0, size + 1))


def _range(record: Json) -> _Range | None:
    """Where a record's bytes lie in a shard; None when the record makes no sense."""
    try:
        place = Slice.of(record, "")
    except ReadError:
        return None
    return place.shard, place.begin, place.end


def _read_ranges(files: RunFiles, ranges: set[_Range | None]) -> dict[_Range | None, memoryview]:
    """The bytes of ranges; those that touch are read as one, and those that cannot be read are left out."""
    found: dict[_Range | None, memoryview] = {}
    for run in _touching(sorted(each for each in ranges if each is not None)):
        shard, begin, end = run[0][0], run[0][1], run[-1][2]
        if end > (files.size(shard) or 0):
            continue
        try:
            data = memoryview(files.read(shard, begin, end))
        except ReadError:
            continue
        if len(data) == end - begin:
            found.update((each, data[each[1] - begin : each[2] - begin]) for each in run)
    return found


def _touching(ranges: Sequence[_Range]) -> Iterator[list[_Range]]:
    run: list[_Range] = []
    for each in ranges:
        if run and (each[0] != run[-1][0] or each[1] != run[-1][2]):
            yield run
            run = []
        run.append(each)
    if run:
        yield run


@cache
def _payload_in() -> Callable[[torch.dtype, Sequence[int], bytes], memoryview | None]:
    # Looked up by name, since the engine never imports a backend.
    found: Any = importlib.import_module("tlcore_backends.pt.encode").payload_in
    checked: Callable[[torch.dtype, Sequence[int], bytes], memoryview | None] = found
    return checked
