"""The contract of a store (a place for named bytes), and of what only some stores can do besides.

What a store can do beyond `Store` it says by having the methods of a protocol named ``Supports...``;
whoever wants one asks ``isinstance(store, SupportsFiles)`` and has another way for the rest. The
conformance suite in `tlcore.testing` tests what a store claims and leaves out what it does not.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview


class Entry(NamedTuple):
    """One stored blob: its name relative to the store's root, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long one request to a remote store may take, in seconds, and how often it is tried."""

    deadline_s: float = 30.0
    attempts: int = 4


@dataclass(frozen=True, slots=True)
class Location:
    """Where runs lie: the directory or URL that holds run directories, and how it is reached.

    ``storage_options`` go to whatever opens the URL; they may hold secrets and are never shown.
    """

    url: str
    storage_options: Mapping[str, Any] | None = None
    retries: RetryPolicy = RetryPolicy()
    fsync: bool = False


@runtime_checkable
class Store(Protocol):
    """Named blobs under one root (a run's directory). Names are relative, ``/``-separated.

    Publication is atomic: a reader sees a whole blob or none. Methods raise FileNotFoundError for a
    missing name and BackendError (redacted) for everything a place can refuse. Safe to call from
    several threads.
    """

    @property
    def url(self) -> str:
        """The root, redacted, for messages."""
        ...

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Publish the concatenation of ``parts``; returns its size once it is stored."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` the same blob as ``source`` in the cheapest way (hard link, server copy)."""
        ...

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a blob, all of it by default."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All blobs whose name starts with ``prefix``, in any order; unfinished ones are not listed."""
        ...

    def delete(self, name: str) -> None:
        """Remove a blob; a missing one is not an error."""
        ...

    def close(self) -> None:
        """Release connections and handles."""
        ...


class Level(NamedTuple):
    """What lies directly in a directory: its blobs, and the directories in it, by their full names."""

    blobs: list[Entry]
    directories: list[str]


@runtime_checkable
class SupportsLevels(Protocol):
    """A store that can look into one directory without listing all that lies below it."""

    def level(self, directory: str = "") -> Level:
        """What lies directly in ``directory`` (``""`` is the root); nothing for a missing one."""
        ...


@runtime_checkable
class SupportsNames(Protocol):
    """A store to which the sizes of blobs cost more than their names."""

    def names(self, prefix: str = "") -> Collection[str]:
        """The names that `Store.list` gives, in any order."""
        ...


@runtime_checkable
class SupportsFiles(Protocol):
    """A store whose blobs are files of this machine: reading them needs no request, and has no latency."""

    def path(self, name: str = "") -> str:
        """The absolute path of a blob's file, whether it is there or not; of the root for ``""``.

        Raises BackendError for a name that leaves the root.
        """
        ...

    def open_file(self, name: str) -> BinaryIO:
        """A blob, unbuffered and open for reading. Raises as `Store.get`."""
        ...

    def identity(self, name: str) -> Hashable | None:
        """Equal for names of one and the same file (hard links); None for a missing one."""
        ...


class Appending(Protocol):
    """A blob that is being written piece by piece. Its methods raise OSError as the system does."""

    @property
    def target(self) -> str:
        """What it will be, for messages."""
        ...

    def write(self, parts: Sequence[Buffer]) -> int:
        """Append ``parts``; returns how many bytes they were."""
        ...

    def publish(self, head: bytes = b"") -> None:
        """Put ``head`` into the reserved place and give the blob its name."""
        ...

    def abandon(self) -> None:
        """Forget what was written; nothing happens to a blob that was published."""
        ...


@runtime_checkable
class SupportsManyReads(Protocol):
    """A store that reads many small blobs at once."""

    def get_many(self, names: Sequence[str], sizes: Sequence[int]) -> Sequence[memoryview | None]:
        """The bytes of whole blobs whose sizes are known; None where one is not there in that size.

        Raises BackendError for a name that leaves the root.
        """
        ...


@runtime_checkable
class SupportsBuffers(Protocol):
    """A store whose client has a range in memory that need not be copied to become bytes."""

    def get_buffer(self, name: str, start: int, end: int) -> memoryview:
        """The bytes ``[start, end)`` of a blob, in memory that is read only. Raises as `Store.get`."""
        ...


@runtime_checkable
class SupportsAppend(Protocol):
    """A store in which a blob can be written before it is whole."""

    def begin(self, name: str, reserve: int) -> Appending:
        """A blob to be written behind ``reserve`` bytes, published as ``name``. Raises BackendError."""
        ...


@runtime_checkable
class SupportsPutFile(Store, Protocol):
    """A store of files of this machine, which copies one at less cost than its bytes can be read and put."""

    def put_file(self, name: str, file: BinaryIO) -> int:
        """Publish the bytes of a file as ``name``; returns its size in bytes. Raises as `Store.put`."""
        ...


class Folder(NamedTuple):
    """A directory with all that is in it, as `tlcore.hotpath.making.make_files` takes it."""

    folders: Sequence[str]
    names: Sequence[str]
    rows: Buffer
    texts: Buffer
    data: Buffer


class OpenFolder(Protocol):
    """A directory that is being filled, by several threads at once. Its methods raise BackendError."""

    def make(self, folder: Folder) -> None:
        """Make files, and directories for them, none of which is there."""
        ...

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        """Give each file of the first names, which are there, a second one."""
        ...

    def publish(self) -> None:
        """Give the directory its name."""
        ...

    def abandon(self) -> None:
        """Forget what was written; nothing happens to a directory that was published."""
        ...


@runtime_checkable
class SupportsFolders(Protocol):
    """A store in which many blobs can be published at once, as a directory."""

    def begin_folder(self, name: str) -> OpenFolder | None:
        """A directory to be filled, then published as ``name``; None where it is there, or cannot be had so.

        Raises BackendError.
        """
        ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """A store whose root is made, and may be refused, before the first blob is put."""

    def prepare(self) -> None:
        """Make the root. Raises BackendError when it cannot be made or is not safe to write into."""
        ...

    def prepare_parent(self) -> None:
        """Make what the root lies in, without the root. Raises BackendError as `prepare`, or OSError."""
        ...


@runtime_checkable
class SupportsCachedWrites(Protocol):
    """A store that may keep what it writes out of the system's page cache."""

    def write_cached(self) -> None:
        """Leave what is written from now on in the cache: somebody waits for it, and reads it soon."""
        ...


@runtime_checkable
class SupportsOverwrite(Protocol):
    """A store that may still replace a small blob when it has no room for another one."""

    def overwrite(self, name: str, text: str) -> bool:
        """Whether ``text`` now stands in the room that ``name`` has already; not atomic, never raises."""
        ...


@runtime_checkable
class SupportsWaiting(Protocol):
    """A store, or a sink, that keeps what its place does not take yet and delivers it later."""

    @property
    def waiting(self) -> str | None:
        """What has not reached its place yet, in words; None when everything has."""
        ...


@runtime_checkable
class SupportsUsage(Protocol):
    """A store that knows better than the sum of its blobs' sizes what it takes."""

    def usage(self) -> int:
        """Bytes taken, with hard links to one file counted once."""
        ...


@runtime_checkable
class SupportsRemoval(Protocol):
    """A store whose root outlives its blobs (a directory), and can be removed."""

    def remove_root(self) -> None:
        """Remove the root and all that is left below it. Raises BackendError."""
        ...
