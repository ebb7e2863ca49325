"""From a path or URL to the store of a run, or of the runs below it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from ..errors import BackendError, MissingError, ReadError
from ..locations import is_url
from ..registry import open_store
from ..storage import Buffer, Entry, Level, Store, SupportsFiles, SupportsLevels


def local_directory(path: str | os.PathLike[str]) -> Path | None:
    """``path`` (or ``file://`` URL) as a directory of this machine; None for any other URL.

    Raises ReadError for a file, or nothing there.
    """
    text = os.fspath(path)
    if is_url(text):
        parts = urlsplit(text)
        if parts.scheme.lower() not in ("file", "local") or parts.netloc:
            return None
        directory = Path(unquote(parts.path))
    else:
        directory = Path(text).expanduser()
    if not directory.exists():
        if directory.is_symlink():
            raise ReadError(f"{text}: is a symbolic link that leads nowhere")
        raise MissingError(f"{text}: there is no such directory")
    if not directory.is_dir():
        raise ReadError(f"{text}: is a file; give the run's directory")
    return directory


def open_existing(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store of a local directory or URL; ``storage_options`` go to whatever opens the URL.

    Raises ReadError when there is no such directory, BackendError when the URL cannot be opened.
    """
    directory = local_directory(path)
    if directory is None:
        return open_store(os.fspath(path), storage_options)
    return open_store(os.path.realpath(directory))


def open_file(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """A file as a store that holds nothing else; raises as `open_existing`, of its directory.

    One that is given by a symbolic link is what that leads to, under its own name.
    """
    text = os.fspath(path).rstrip("/")
    name = text.rpartition("/")[2]
    real = text if is_url(text) else os.path.realpath(text)
    directory, _, real_name = real.rpartition("/")
    store = open_existing(directory or ("." if is_url(text) else "/"), storage_options)
    if isinstance(store, SupportsFiles):
        return OneLocalFile(store, name, real_name)
    return OneFile(store, name)


class OneFile:
    """One blob of another store, as a store of its own whose URL is the blob's."""

    def __init__(self, store: Store, name: str, real_name: str | None = None) -> None:
        """``real_name`` is the blob's in the other store, where that is another."""
        self._store, self._name, self._real_name = store, name, real_name or name
        self.url = f"{store.url}/{self._real_name}"

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """As the other store does; FileNotFoundError for any other name."""
        return self._store.get(self._of_mine(name), start, end)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The blob."""
        if self._name.startswith(prefix):
            yield from (each for each in self.level().blobs)

    def level(self, directory: str = "") -> Level:
        """The blob."""
        if directory:
            return Level([], [])
        if isinstance(self._store, SupportsLevels):
            blobs = self._store.level().blobs
        else:
            blobs = list(self._store.list(self._real_name))
        return Level([Entry(self._name, each.size) for each in blobs if each.name == self._real_name], [])

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Refused."""
        raise BackendError(f"{self.url}: is a file that another tool wrote")

    def copy(self, source: str, target: str) -> None:
        """Refused."""
        raise BackendError(f"{self.url}: is a file that another tool wrote")

    def delete(self, name: str) -> None:
        """Refused."""
        raise BackendError(f"{self.url}: is a file that another tool wrote")

    def close(self) -> None:
        """Close the other store, which is nobody else's."""
        self._store.close()

    def _of_mine(self, name: str) -> str:
        if name != self._name:
            raise FileNotFoundError(f"{self.url}: is a file, and has no {name!r}")
        return self._real_name


class OneLocalFile(OneFile):
    """A file of this machine, which is read where it lies."""

    def __init__(self, store: Any, name: str, real_name: str | None = None) -> None:
        super().__init__(store, name, real_name)
        self._files: SupportsFiles = store

    def path(self, name: str = "") -> str:
        """The file's absolute path."""
        return self._files.path(self._of_mine(name or self._name))

    def open_file(self, name: str) -> BinaryIO:
        """The file, as the other store opens it."""
        return self._files.open_file(self._of_mine(name))

    def identity(self, name: str) -> Hashable | None:
        """The file's."""
        return self._files.identity(self._real_name) if name == self._name else None


class Below:
    """The blobs below one directory of another store, as a store of their own."""

    def __init__(self, store: Store, directory: str) -> None:
        self._store = store
        self._begin = f"{directory}/"
        self.url = f"{store.url}/{directory}"

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """As the other store does."""
        return self._store.put(self._begin + name, parts)

    def copy(self, source: str, target: str) -> None:
        """As the other store does."""
        self._store.copy(self._begin + source, self._begin + target)

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """As the other store does."""
        return self._store.get(self._begin + name, start, end)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As the other store does."""
        skip = len(self._begin)
        return (Entry(each.name[skip:], each.size) for each in self._store.list(self._begin + prefix))

    def delete(self, name: str) -> None:
        """As the other store does."""
        self._store.delete(self._begin + name)

    def close(self) -> None:
        """The other store is its owner's."""


class _BelowWithLevels(Below):
    """The same of a store that can look into one directory."""

    def __init__(self, store: Store, levels: SupportsLevels, directory: str) -> None:
        super().__init__(store, directory)
        self._levels = levels

    def level(self, directory: str = "") -> Level:
        """As the other store does."""
        found = self._levels.level((self._begin + directory).rstrip("/"))
        skip = len(self._begin)
        blobs = [Entry(each.name[skip:], each.size) for each in found.blobs]
        return Level(blobs, [name[skip:] for name in found.directories])


def below(store: Store, directory: str) -> Below:
    """The blobs below a directory of a store, with what both can do of more than every store."""
    if isinstance(store, SupportsLevels):
        return _BelowWithLevels(store, store, directory)
    return Below(store, directory)
