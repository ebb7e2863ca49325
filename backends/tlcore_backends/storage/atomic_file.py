"""A local file that gets its name once it is whole."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

from tlcore.hotpath.copying import write_all
from tlcore.protocols import Buffer

from .direct_writes import DirectWrites
from .regular_files import copy_bytes

_FILE_MODE = 0o600


class AtomicFile:
    """A file under a temporary name, which gets its real one when it is whole.

    `write` appends, from byte ``reserve`` on, as ``writes`` says; the bytes before are given to `publish`.
    Raises OSError as the system does; then, or when the file is not wanted any more, call `abandon`.
    """

    def __init__(self, path: str, target: str, fsync: bool, writes: DirectWrites, reserve: int = 0) -> None:
        self.target = target
        self._writes = writes
        self._path = path
        self._fsync = fsync
        self._handle: int | None = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE_MODE
        )
        if reserve:
            os.lseek(self._handle, reserve, os.SEEK_SET)

    def write(self, parts: Sequence[Buffer]) -> int:
        """Append ``parts``; returns how many bytes they were."""
        begin = time.perf_counter()
        written = write_all(self._open_handle, parts, self._writes.least)
        self._writes.note(written, time.perf_counter() - begin)
        return written

    def fileno(self) -> int:
        """The handle, for who writes to places of the file; all of that is done before `publish`."""
        return self._open_handle

    def copy(self, handle: int) -> int:
        """Append what another open file has from where it stands; returns how many bytes it was."""
        return copy_bytes(handle, self._open_handle)

    def publish(self, head: bytes = b"") -> None:
        """Put ``head`` in the reserved place and give the file its name."""
        handle = self._open_handle
        if head:
            os.lseek(handle, 0, os.SEEK_SET)
            write_all(handle, [head])
        if self._fsync:
            os.fsync(handle)
        self._close()
        os.rename(self._path, self.target)
        if self._fsync:
            sync_directory(os.path.dirname(self.target))

    def abandon(self) -> None:
        """Remove the file; nothing happens to one that was published."""
        self._close()
        remove_quietly(self._path)

    @property
    def _open_handle(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self.target} is closed")
        return self._handle

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def sync_directory(directory: str) -> None:
    """Have the names in a directory on the disk before this returns."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_quietly(path: str) -> None:
    """Remove a file, if it is there and may be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)
