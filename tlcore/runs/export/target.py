"""Where an export is written: a new directory of this machine, or a place behind a URL.

What is only half there does not look whole. Files lie under a name that nobody reads until all of them are
there, then they get their places: a directory by being renamed, a URL's by the server's own copies. The
documents that make a data set of them come last.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from ...errors import BackendError, ReadError, TlcoreError
from ...hotpath.copying import write_all, write_from
from ...locations import is_url, redact_url
from ...registry import open_store
from ...storage import Buffer, Store

log = logging.getLogger("tlcore")

# Requests on their way at a time.
REMOTE_THREADS = 8
# As pyarrow, `datasets` and others leave out what begins so.
_UNFINISHED = ".unfinished-"
# What S3 copies at a time, in bytes, and what files have beside their values, generously.
_MOST_COPIED = 5 << 30
_HEAD_BYTES = 1 << 20
_S3 = ("s3", "s3a")
# Of the names that a message has.
_MOST_SHOWN = 5


# Addresses.
Rows = np.ndarray[Any, np.dtype[np.int64]]
# Takes the file's name, what stands before the rows, their addresses, the bytes of each, what stands behind.
PutGathered = Callable[[str, Buffer, Rows, int, Buffer], None]


class Target(Protocol):
    """Files by their names in the export. Goes into other processes, which write some of them."""

    @property
    def is_local(self) -> bool:
        """Whether its files lie in a directory, where each of them may be written by several."""
        ...

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write a file from memory. Raises BackendError."""
        ...

    @property
    def put_gathered(self) -> PutGathered | None:
        """What writes a file from where its rows lie; None where it must be given their bytes."""
        ...

    def file(self, name: str) -> Any:
        """A context with the path of a file that is then to be written. Raises BackendError."""
        ...

    def check_size(self, name: str, nbytes: int) -> None:
        """Raise ReadError for a file that would be too large to get its place in the end."""
        ...

    def document(self, name: str, text: str) -> None:
        """A file that comes when all others are there, behind those that were given before."""
        ...


class DirectoryTarget:
    """A directory of this machine."""

    is_local = True

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._documents: dict[str, str] = {}

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write a file."""
        with self._new(name) as handle:
            write_all(handle, parts)

    def put_gathered(self, name: str, head: Buffer, rows: Rows, width: int, tail: Buffer) -> None:
        """Write a file with rows of so many bytes from their addresses in its middle.

        Raises BackendError; ReadError where the rows are no longer there.
        """
        with self._new(name) as handle:
            write_all(handle, [head])
            try:
                write_from(handle, rows, width)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise ReadError(f"{name}: a file of the run was cut off while it was read") from error
                raise
            write_all(handle, [tail])

    @contextmanager
    def _new(self, name: str) -> Iterator[int]:
        path = os.path.join(self._directory, name)
        try:
            try:
                handle = _created(path)
            except FileNotFoundError:
                self._make_parents(name)
                handle = _created(path)
            try:
                yield handle
            finally:
                os.close(handle)
        except OSError as error:
            raise BackendError(f"{path}: cannot be written ({error.strerror or error})") from error

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Its path in the directory."""
        self._make_parents(name)
        yield Path(self._directory, name)

    def _make_parents(self, name: str) -> None:
        """Make what a file lies in below the directory, which itself is there or is gone for good."""
        if not os.path.isdir(self._directory):
            raise BackendError(
                f"{self._directory}: is not there; all workers of a cluster must see the target under"
                " the same name, and nothing is written after an export has failed"
            )
        for parent in reversed(Path(name).parents[:-1]):
            with suppress(FileExistsError):
                os.mkdir(os.path.join(self._directory, parent))

    def check_size(self, name: str, nbytes: int) -> None:
        """The disk says it."""

    def document(self, name: str, text: str) -> None:
        """Keep a text for `finish`."""
        self._documents[name] = text

    def finish(self, names: Collection[str]) -> None:
        """Write the documents. Raises BackendError where one of the files is not there."""
        absent = next(
            (name for name in names if not os.path.exists(os.path.join(self._directory, name))), None
        )
        if absent is not None:
            raise _absent(self._directory, absent)
        for name, text in self._documents.items():
            self.put(name, [text.encode("utf-8")])


class UrlTarget:
    """A place behind a URL. Its unfinished files lie apart from others', by a name that is drawn."""

    is_local = False
    put_gathered: PutGathered | None = None

    def __init__(self, url: str, options: Mapping[str, Any] | None) -> None:
        self._url, self._options = url, options
        self._place = f"{_UNFINISHED}{uuid4().hex[:12]}/"
        self._documents: dict[str, str] = {}
        self._placed: list[str] = []
        self._opened: tuple[int, Store] | None = None

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Upload a file."""
        self._store.put(self._place + name, parts)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path on this machine's disk, from which the file is uploaded."""
        try:
            with tempfile.TemporaryDirectory(prefix="tlcore-export-") as directory:
                path = Path(directory, os.path.basename(name))
                yield path
                with path.open("rb") as file:
                    import mmap

                    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                        whole = memoryview(data)
                        try:
                            self.put(name, [whole])
                        finally:
                            whole.release()
        except OSError as error:
            raise BackendError(
                f"{tempfile.tempdir or 'the temporary directory'}: {name} cannot be made there before it goes"
                f" to {redact_url(self._url)} ({error.strerror or error});"
                " the environment variable TMPDIR names another directory"
            ) from error

    def check_size(self, name: str, nbytes: int) -> None:
        """Of what S3 copies by one request, there is a limit."""
        if self._url.partition("://")[0].lower() in _S3 and nbytes + _HEAD_BYTES > _MOST_COPIED:
            raise ReadError(
                f"{redact_url(self._url)}: {name} would have {nbytes / (1 << 30):.1f} GiB, and S3 copies"
                " at most 5 GiB to its place; export into a directory, or as parquet, which has many files"
            )

    def document(self, name: str, text: str) -> None:
        """Keep a text for `finish`."""
        self._documents[name] = text

    def check(self) -> None:
        """Raise ReadError where something is there already, BackendError where it cannot be looked at."""
        found = next(iter(self._store.list()), None)
        if found is None:
            return
        unfinished = found.name.startswith(_UNFINISHED)
        what = (
            f"an export that was not finished is there ({found.name})" if unfinished else "is there already"
        )
        raise ReadError(f"{redact_url(self._url)}: {what}; export into a new place")

    def finish(self, names: Collection[str]) -> None:
        """Give the files their places, then the documents.

        Raises BackendError, also where one is not there; ReadError where others have written meanwhile.
        """
        found: set[str] = set()
        for entry in self._store.list():
            if entry.name.startswith(self._place):
                found.add(entry.name.removeprefix(self._place))
            elif not entry.name.startswith(_UNFINISHED):
                raise ReadError(
                    f"{redact_url(self._url)}: {entry.name} has come there from elsewhere meanwhile;"
                    " export into a place of its own"
                )
        absent = next((name for name in names if name not in found), None)
        if absent is not None:
            raise _absent(redact_url(self._url), absent)
        self._each(names, self._copied)
        for name, text in self._documents.items():
            # Noted before: what fails may have come there.
            self._placed.append(name)
            self._store.put(name, [text.encode("utf-8")])

    def _copied(self, name: str) -> None:
        self._placed.append(name)
        self._store.copy(self._place + name, name)

    def clear(self, whole: bool) -> None:
        """Remove the unfinished files, and with ``whole`` those that this export has given their places.

        What others have there stays. Warns where something cannot be removed.
        """
        left: list[str] = []
        errors: list[Exception] = []

        def remove(name: str) -> None:
            try:
                self._store.delete(name)
            except (TlcoreError, OSError) as error:
                left.append(name)
                errors.append(error)

        try:
            self._each(self._placed if whole else [], remove)
            self._each([entry.name for entry in self._store.list(self._place)], remove)
        except (TlcoreError, OSError) as error:
            left.append(self._place)
            errors.append(error)
        if errors:
            # Of what is unfinished the directory says enough.
            shown = sorted({self._place if name.startswith(self._place) else name for name in left})
            more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
            what = f"{', '.join(shown[:_MOST_SHOWN])}{more}"
            place = redact_url(self._url)
            log.warning("%s: remove by hand %s, which could not be (%s)", place, what, errors[0])

    def _each(self, names: Collection[str], call: Any) -> None:
        with ThreadPoolExecutor(REMOTE_THREADS, "tlcore-export") as pool:
            for _ in pool.map(call, names):
                pass

    @property
    def _store(self) -> Store:
        # No connection crosses a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_store(self._url, self._options)
        return self._opened[1]

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_opened": None, "_documents": {}, "_placed": []}


Finishing = DirectoryTarget | UrlTarget


@contextmanager
def new_target(target: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Iterator[Finishing]:
    """A place to write into; what was written is removed unless the context ends well. Raises TlcoreError."""
    text = os.fspath(target)
    if is_url(text):
        yield from _at_url(text.rstrip("/"), options)
    else:
        yield from _in_directory(text)


def _at_url(url: str, options: Mapping[str, Any] | None) -> Iterator[UrlTarget]:
    target = UrlTarget(url, options)
    target.check()
    try:
        yield target
    except BaseException:
        target.clear(whole=True)
        raise
    target.clear(whole=False)


def _in_directory(text: str) -> Iterator[DirectoryTarget]:
    path = Path(text).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ReadError(f"{text}: is there already; export into a new directory")
    made: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
        yield DirectoryTarget(made)
        made.rename(path)
    except OSError as error:
        raise BackendError(f"{text}: cannot be written ({error.strerror or error})") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _absent(place: str, name: str) -> BackendError:
    return BackendError(
        f"{place}: {name} was written by another process and is not there;"
        " all workers of a cluster must see the target under the same name"
    )


def _created(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
