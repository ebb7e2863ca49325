"""Many payloads, one after the other: read in large pieces by several threads, and hashed there.

Reading and hashing leave the interpreter free, so two threads on the local disk are enough to keep it
busy; a remote store answers many requests at a time.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from ..alike import Move
from ..errors import ReadError
from ..hotpath.hashing import hex_digests
from ..layout.hashes import HASH_PREFIX
from ..record import Json
from ..storage import Buffer
from .proven import sound_move, sound_read
from .stored import Stored

# What one thread takes at a time. A larger tensor is read alone.
_GROUP_BYTES = 8 << 20
_GROUP_RECORDS = 64
# Of a format in which the tensors of consecutive steps touch.
_GROUP_OF_ARRAYS = 8192
_LOCAL_THREADS = min(4, os.cpu_count() or 1)
# Of a step that is written while it is read, by one thread: memory is soon used again, and others have work.
_GROUP_OF_WHOLE = 4 << 20
# Of one whose tensors two threads write into its files at once.
_GROUP_OF_MOVED = 8 << 20
_REMOTE_THREADS = 8
_NOTHING = memoryview(b"")


class Payload(NamedTuple):
    """A stored tensor's bytes and their xxh3-128 in hex, or ``problem``: why they could not be read.

    ``data`` is empty where only the hash was asked for.
    """

    record: Json
    data: memoryview
    digest: str = ""
    problem: str | None = None


def read_payloads(stored: Stored, records: Sequence[Json], keep: bool) -> Iterator[Payload]:
    """The payloads of ``records`` (of a checked ``step.json``) in their order; never raises ReadError.

    Without ``keep`` only the hashes are returned, and bytes that several records share are read once.
    At most a few groups of 8 MiB, or of one larger tensor, are in memory.
    """
    return itertools.chain.from_iterable(_read_groups(stored, records, keep, whole=False))


def read_whole(stored: Stored, records: Sequence[Json]) -> Iterator[Sequence[Payload]]:
    """The payloads of a step as they were read together, at the pace of whoever writes them.

    Aliases come without their bytes.
    """
    return _read_groups(stored, records, keep=True, whole=True)


def move_whole(stored: Stored, records: Sequence[Json]) -> Iterator[tuple[Sequence[Payload], Move]]:
    """The payloads of a step without their bytes, and what writes those of each group into a file.

    Raises ReadError for such as have to be read: that tells what is wrong with them, if anything is.
    """
    known: dict[Hashable, str] = {}
    for group in _groups(records, _GROUP_OF_MOVED, _GROUP_OF_ARRAYS, aliases=False):
        move = sound_move(stored, group, known)
        if move is None:
            raise ReadError(f"{stored.url}: some tensors cannot be moved")
        yield [Payload(record, _NOTHING, record["hash"].removeprefix(HASH_PREFIX)) for record in group], move


def _read_groups(
    stored: Stored, records: Sequence[Json], keep: bool, whole: bool
) -> Iterator[Sequence[Payload]]:
    reader = _Reader(stored, keep, whole)
    nbytes = _GROUP_OF_WHOLE if whole and stored.is_local else _GROUP_BYTES
    most = _GROUP_OF_ARRAYS if stored.has_arrays or whole else _GROUP_RECORDS
    groups = list(_groups(records, nbytes, most, aliases=not whole))
    if len(groups) < 2:
        # A small step: making a thread takes longer than reading it.
        for group in groups:
            yield reader.reading(group)()
        return
    threads = (1 if whole else _LOCAL_THREADS) if stored.is_local else _REMOTE_THREADS
    waiting: deque[Future[list[Payload]]] = deque()
    pool = ThreadPoolExecutor(threads, "tlcore-read")
    try:
        for group in groups:
            waiting.append(pool.submit(reader.reading(group)))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(
    records: Sequence[Json], nbytes: int, most: int, aliases: bool = True
) -> Iterator[Sequence[Json]]:
    """Records one after the other, of about ``nbytes`` that are read; those of ``aliases`` may not be."""
    begin, size = 0, 0
    for index, record in enumerate(records):
        own = record["bytes"] if aliases or record.get("alias_of") is None else 0
        if index > begin and (size + own > nbytes or index - begin >= most):
            yield records[begin:index]
            begin, size = index, 0
        size += own
    if begin < len(records):
        yield records[begin:]


class _Reader:
    """Reads groups of records; used by several threads."""

    def __init__(self, stored: Stored, keep: bool, whole: bool) -> None:
        self._stored = stored
        self._keep, self._whole = keep, whole
        self._proven: dict[Hashable, str] = {}
        # Hashes by where the bytes lie: a range of a shard, or a file that may have several names.
        self._known: dict[Hashable, str] = {}

    def reading(self, group: Sequence[Json]) -> Callable[[], list[Payload]]:
        """What gives the group's payloads in order, in any thread."""
        if not self._whole:
            return partial(self._read, group)
        return partial(self._read_whole, group, sound_read(self._stored, group, self._proven))

    def _read_whole(
        self, group: Sequence[Json], read: Callable[[], Sequence[Buffer] | None]
    ) -> list[Payload]:
        sound = read()
        if sound is None:
            return self._read(group)
        return [
            Payload(record, memoryview(data), record["hash"].removeprefix(HASH_PREFIX))
            for record, data in zip(group, sound, strict=True)
        ]

    def _read(self, group: Sequence[Json]) -> list[Payload]:
        identities = [self._identity(record) for record in group]
        # Each of those that share stored bytes stands for the others, where only hashes are asked for.
        first: dict[Hashable, int] = {}
        wanted = []
        for index, identity in enumerate(identities):
            told = identity in self._known and not self._keeps(group[index])
            if identity is None or not (told or identity in first):
                wanted.append(index)
                first.setdefault(identity, index)
        found = dict(zip(wanted, self._stored.read_many([group[index] for index in wanted]), strict=True))
        there = {
            index: data
            for index, data in found.items()
            if not isinstance(data, ReadError) and identities[index] not in self._known
        }
        digests = dict(zip(there, hex_digests(list(there.values())), strict=True))
        return [
            self._payload(group[i], identities[i], found.get(i), digests.get(i), first, found)
            for i in range(len(group))
        ]

    def _payload(
        self,
        record: Json,
        identity: Hashable | None,
        data: Buffer | ReadError | None,
        hashed: str | None,
        first: Mapping[Hashable, int],
        found: Mapping[int, Buffer | ReadError],
    ) -> Payload:
        digest = None if identity is None else self._known.get(identity)
        if data is None:
            if digest is None or self._keeps(record):
                # Only one that could not be read has left no hash.
                data = found[first[identity]]
            else:
                return Payload(record, _NOTHING, digest)
        if isinstance(data, ReadError):
            return Payload(record, _NOTHING, problem=str(data))
        digest = hashed or digest or ""
        if identity is not None:
            self._known[identity] = digest
        return Payload(record, memoryview(data) if self._keeps(record) else _NOTHING, digest)

    def _keeps(self, record: Json) -> bool:
        return self._keep and not (self._whole and "alias_of" in record)

    def _identity(self, record: Json) -> Hashable | None:
        try:
            return self._stored.identity(record)
        except ReadError:
            return None
