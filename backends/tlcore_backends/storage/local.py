"""Places that keep named bytes: `LocalStore`, a directory on a local or mounted file system."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tlcore.errors import BackendError
from tlcore.hotpath.beneath import list_files
from tlcore.hotpath.making import NO_HARD_LINKS
from tlcore.hotpath.reading import FILE_ALIGNMENT, Scratch, read_files
from tlcore.storage import Buffer, Entry, Level, Location, Store

from .atomic_file import AtomicFile, remove_quietly, sync_directory
from .direct_writes import DirectWrites
from .directories import DIRECTORY_MODE, make_parent, refused, walk
from .regular_files import open_regular, read_all
from .unfinished_folder import UnfinishedFolder

UNFINISHED = ".tmp"
_UNFINISHED_FILE = re.compile(rf".+\.[0-9a-f]{{8}}-\d+{re.escape(UNFINISHED)}", re.DOTALL)
# What st_blocks counts in, whatever the file system's blocks are.
_BLOCK_BYTES = 512
# A long run makes a few directories a step; those it will not use again are forgotten.
_MOST_KNOWN_DIRECTORIES = 4096
_BAD_NAME = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|\0")


def check_name(name: str) -> str:
    """``name`` itself, if it is relative and cannot leave the root it is joined to.

    Raises BackendError for an absolute name, an empty, ``.`` or ``..`` component, a NUL, or a name that
    ends like an unfinished file.
    """
    # What is certainly none is told in a tenth of the time, and every file that is opened is asked for.
    odd = name[:1] in ("", "/", ".") or name[-1] == "/" or "/." in name or "//" in name or "\0" in name
    if (odd and _BAD_NAME.search(name)) or name.endswith(UNFINISHED):
        raise BackendError(f"{name!r} is not a valid name: it must be a relative path without '..'")
    return name


def open_local(location: Location) -> Store:
    """The store of a path or a ``file://`` URL of this machine; of another machine's, fsspec's."""
    if "://" not in location.url:
        return LocalStore(location.url, location.fsync)
    parts = urlsplit(location.url)
    if not parts.netloc:
        return LocalStore(unquote(parts.path), location.fsync)
    # Loaded only when needed: most runs go to the local disk.
    from .remote import open_remote

    return open_remote(location)


class LocalStore:
    """Blobs as files under the directory ``root``, which is made (mode 0700) at the first write.

    A blob is written to ``<name>.<unique>.tmp`` beside its place, then renamed. With ``fsync`` it is on
    the disk, with its directory, before `put` returns.
    """

    def __init__(self, root: str | os.PathLike[str], fsync: bool = False) -> None:
        self.root = Path(os.path.abspath(root))
        self._root = str(self.root)
        self._fsync = fsync
        self._known_directories: set[str] = set()
        self._real_directories: dict[str, str] = {}
        self._token = secrets.token_hex(4)
        self._counter = itertools.count()
        self._scratch = Scratch()
        self._writes = DirectWrites()

    def write_cached(self) -> None:
        """Write nothing past the page cache."""
        self._writes.end()

    @property
    def url(self) -> str:
        """The root as an absolute path."""
        return self._root

    def prepare(self) -> None:
        """Make the root, or accept an existing one that only this user can write.

        Raises BackendError when it cannot be made, is a symbolic link or no directory, belongs to
        somebody else, can be written by others, or lies where others could replace it.
        """
        try:
            make_parent(self._root)
            self._make_directory(self._root)
            status = os.lstat(self._root)
        except OSError as error:
            error.strerror = f"{error.strerror or error}; give an output_dir that this user can write to"
            raise refused("make the run directory", self._root, error) from error
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BackendError(
                f"{self.root}: other users can write this directory; choose another output_dir, or remove it"
            )

    def prepare_parent(self) -> None:
        """Make the directory that the root lies in, or accept it. Raises BackendError, or OSError."""
        make_parent(self._root)

    def path(self, name: str = "") -> str:
        """The absolute path of a blob's file, or of the root."""
        return self._place(name) if name else self._root

    def usage(self) -> int:
        """Bytes that the blobs take; hard links to one file count once."""
        sizes: dict[tuple[int, int], int] = {}
        for entry in self.list():
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self._place(entry.name))
                sizes[status.st_dev, status.st_ino] = status.st_size
        return sum(sizes.values())

    def remove_root(self) -> None:
        """Remove the root and all that is left below it."""
        try:
            shutil.rmtree(self._root)
        except OSError as error:
            raise BackendError(f"cannot remove {self._root}: {error.strerror or error}") from error

    def put(self, name: str, parts: Sequence[Buffer]) -> int:
        """Publish the concatenation of ``parts`` as ``name``; returns its size in bytes."""
        target = self._place(name)
        try:
            self._ensure_parent(target)
            return self._publish(target, lambda file: file.write(parts))
        except OSError as error:
            raise refused("write", target, error) from error

    def put_file(self, name: str, file: io.RawIOBase) -> int:
        """Publish the bytes of an open file, from where it stands, as ``name``; returns its size in bytes."""
        target = self._place(name)
        try:
            self._ensure_parent(target)
            return self._publish(target, lambda new: new.copy(file.fileno()))
        except OSError as error:
            raise refused("write", target, error) from error

    def overwrite(self, name: str, text: str) -> bool:
        """Whether ``text`` now stands in the room that the file ``name`` has on the disk already.

        Only for when `put` fails: this needs no new room, but a crash in the middle would leave half of it.
        """
        data = text.encode("utf-8")
        try:
            handle = os.open(self._place(name), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if len(data) > os.fstat(handle).st_blocks * _BLOCK_BYTES:
                    return False
                done = os.pwrite(handle, data, 0) == len(data)
                os.ftruncate(handle, len(data))
                return done
            finally:
                os.close(handle)
        except OSError:
            return False

    def begin_folder(self, name: str) -> UnfinishedFolder | None:
        """A directory to be published as ``name``; None where it is there, or must reach the disk."""
        target = self._place(name)
        if self._fsync or os.path.lexists(target):
            return None
        try:
            self._ensure_parent(target)
            return UnfinishedFolder(self._unfinished(target), target)
        except OSError as error:
            raise refused("write", target, error) from error

    def begin(self, name: str, reserve: int) -> AtomicFile:
        """A file to be written piece by piece behind ``reserve`` bytes, then published as ``name``."""
        target = self._place(name)
        try:
            self._ensure_parent(target)
            return AtomicFile(self._unfinished(target), target, self._fsync, self._writes, reserve)
        except OSError as error:
            raise refused("write", target, error) from error

    def copy(self, source: str, target: str) -> None:
        """Make ``target`` a hard link to ``source``, or a real copy where links are refused."""
        origin, place = self._place(source), self._place(target)
        if not os.path.lexists(origin):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), origin)
        try:
            self._ensure_parent(place)
            if not self._link(origin, place):
                self._copy_bytes(origin, place)
        except OSError as error:
            raise refused("copy", place, error) from error

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes ``[start, end)`` of a blob; a symbolic link that leaves the root is refused."""
        try:
            # Straight to the system: a file object would cost as much again as reading a small file.
            handle = open_regular(self._resolved(self._place(name)), os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(handle).st_size
                return read_all(handle, start, max(0, min(size, size if end is None else end) - start))
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise refused("read", self._place(name), error) from error

    def get_many(self, names: Sequence[str], sizes: Sequence[int]) -> Sequence[memoryview | None]:
        """The bytes of whole blobs of these sizes; None where one is not there so, or behind a link."""
        names = [check_name(name) for name in names]
        memory = self._scratch.take(sum(sizes) + FILE_ALIGNMENT * len(sizes))
        begins = read_files(memory, self._root, names, sizes)
        whole = memoryview(memory)
        return [
            whole[begin : begin + size] if begin >= 0 else None
            for begin, size in zip(begins, sizes, strict=True)
        ]

    def open_file(self, name: str) -> io.FileIO:
        """The blob as a file open for reading; a symbolic link that leaves the root is refused.

        Raises OSError as the system does.
        """
        return open(self._resolved(self._place(name)), "rb", buffering=0, opener=open_regular)

    def identity(self, name: str) -> tuple[int, ...] | None:
        """Equal for names that are hard links to one file, as it is now; None for a missing name."""
        try:
            state = os.lstat(self._place(name))
        except OSError:
            return None
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All finished files whose name starts with ``prefix``; symbolic links are not followed."""
        for name, entry in self._entries(prefix):
            try:
                yield Entry(name, entry.stat(follow_symlinks=False).st_size)
            except FileNotFoundError:
                continue

    def names(self, prefix: str = "") -> Collection[str]:
        """The names of these files, none of which is looked at."""
        directory = prefix.rpartition("/")[0]
        found = list_files(self._root, check_name(directory)) if directory else None
        if found is None:
            # Who lists it anew says what is wrong.
            return [name for name, _ in self._entries(prefix)]
        if prefix == f"{directory}/" and UNFINISHED not in "/".join(found):
            # All of them, without a look at each.
            return found
        return [name for name in found if name.startswith(prefix) and _is_finished(name)]

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        directory = prefix.rpartition("/")[0]
        start = self._place(directory) if directory else self._root
        skip = len(self._root) + 1
        for entry in walk(start):
            name = entry.path[skip:]
            if name.startswith(prefix) and _is_finished(name):
                yield name, entry

    def level(self, directory: str = "") -> Level:
        """What lies directly in a directory; symbolic links are left out."""
        start = self._place(directory) if directory else self._root
        begin = f"{directory}/" if directory else ""
        found = Level([], [])
        try:
            with os.scandir(start) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if directory or not _UNFINISHED_FILE.fullmatch(entry.name):
                            found.directories.append(begin + entry.name)
                    elif entry.is_file(follow_symlinks=False) and not entry.name.endswith(UNFINISHED):
                        try:
                            size = entry.stat(follow_symlinks=False).st_size
                        except FileNotFoundError:
                            continue
                        found.blobs.append(Entry(begin + entry.name, size))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise refused("list", start, error) from error
        return found

    def delete(self, name: str) -> None:
        """Remove a blob; a missing one is not an error."""
        place = self._place(name)
        try:
            os.unlink(place)
        except FileNotFoundError:
            return
        except OSError as error:
            raise refused("delete", place, error) from error

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _place(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _resolved(self, place: str) -> str:
        """The file behind ``place``. Raises BackendError where symbolic links lead out of the root."""
        directory, _, base = place.rpartition("/")
        real = self._real_directories.get(directory)
        if real is None:
            if len(self._real_directories) > _MOST_KNOWN_DIRECTORIES:
                self._real_directories.clear()
            real = self._real_directories[directory] = self._inside(directory)
        # Resolving every directory on the way again would cost more than reading a small file.
        return self._inside(place) if os.path.islink(place) else f"{real}/{base}"

    def _inside(self, place: str) -> str:
        real, real_root = os.path.realpath(place), os.path.realpath(self._root)
        if os.path.commonpath([real, real_root]) != real_root:
            raise BackendError(f"{place}: leads out of {self._root} through a symbolic link")
        return real

    def _unfinished(self, target: str) -> str:
        return f"{target}.{self._token}-{next(self._counter)}{UNFINISHED}"

    def _ensure_parent(self, target: str) -> None:
        if self._root not in self._known_directories:
            self.prepare()
        if len(self._known_directories) > _MOST_KNOWN_DIRECTORIES:
            self._known_directories = {self._root}
        known, missing = self._known_directories, []
        directory = os.path.dirname(target)
        while directory not in known:
            missing.append(directory)
            directory = os.path.dirname(directory)
        for directory in reversed(missing):
            self._make_directory(directory)

    def _make_directory(self, directory: str) -> None:
        try:
            os.mkdir(directory, DIRECTORY_MODE)
            if self._fsync:
                sync_directory(os.path.dirname(directory))
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                raise NotADirectoryError(
                    errno.ENOTDIR,
                    "a symbolic link or a file is in the way",
                    str(directory),
                ) from None
        self._known_directories.add(directory)

    def _publish(self, target: str, fill: Callable[[AtomicFile], int]) -> int:
        file = AtomicFile(self._unfinished(target), target, self._fsync, self._writes)
        try:
            size = fill(file)
            file.publish()
        except BaseException:
            file.abandon()
            raise
        return size

    def _link(self, origin: str, place: str) -> bool:
        """Whether ``place`` now is a hard link to ``origin``; False where the file system refuses."""
        try:
            try:
                os.link(origin, place, follow_symlinks=False)
            except FileExistsError:
                unfinished = self._unfinished(place)
                os.link(origin, unfinished, follow_symlinks=False)
                os.rename(unfinished, place)
                # Renaming onto another link of the same file does nothing and leaves the old name.
                remove_quietly(unfinished)
        except OSError as error:
            if error.errno in NO_HARD_LINKS:
                return False
            raise
        if self._fsync:
            sync_directory(os.path.dirname(place))
        return True

    def _copy_bytes(self, origin: str, place: str) -> None:
        with open(origin, "rb", buffering=0) as file:
            self._publish(place, lambda new: new.copy(file.fileno()))


def _is_finished(name: str) -> bool:
    """Whether a file is, and the directory of the root that it lies in; only those are made as a whole."""
    if UNFINISHED not in name:
        return True
    begun = _UNFINISHED_FILE.fullmatch(name.partition("/")[0]) is not None
    return not begun and not name.endswith(UNFINISHED)


def unfinished_files(directory: str) -> Iterator[str]:
    """Paths of what some `LocalStore` has begun below a directory and not finished: files and directories."""
    for parent, folders, names in os.walk(directory):
        begun = [name for name in folders if parent == directory and _UNFINISHED_FILE.fullmatch(name)]
        for name in begun:
            folders.remove(name)
            yield os.path.join(parent, name)
        for name in names:
            path = os.path.join(parent, name)
            if _UNFINISHED_FILE.fullmatch(name) and not os.path.islink(path):
                yield path
