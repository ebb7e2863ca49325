"""Local directories: made so that nobody else can write them, and everything that lies below one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from tlcore.errors import BackendError

from .trust import check_trusted

DIRECTORY_MODE = 0o700


def walk(directory: str) -> Iterator[os.DirEntry[str]]:
    """Every regular file below ``directory``; a directory that is missing or vanishes has none."""
    waiting = [directory]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise refused("list", directory, error) from error
        yield from (entry for entry in found if entry.is_file(follow_symlinks=False))
        waiting += (entry.path for entry in found if entry.is_dir(follow_symlinks=False))


def make_parent(path: str) -> None:
    """Make the directory that ``path`` lies in, with mode 0700, unless others could replace it.

    Raises BackendError or OSError.
    """
    parent = os.path.dirname(os.path.abspath(path))
    check_trusted(parent)
    _make_parents(parent)
    check_trusted(parent)


def _make_parents(directory: str) -> None:
    """Make ``directory`` and its missing parents, each with mode 0700; existing ones are left alone."""
    if os.path.isdir(directory):
        return
    _make_parents(os.path.dirname(directory))
    try:
        os.mkdir(directory, DIRECTORY_MODE)
    except FileExistsError:
        if not os.path.isdir(directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory) from None


def check_can_be_made(directory: str, key: str) -> None:
    """Raise BackendError, naming the configuration's ``key``, where nothing could be written there."""
    there = directory
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise BackendError(f"{key}: {there} is no directory; give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BackendError(
            f"{key}: {there} cannot be written to by this user; give another one, or permit it"
        )


def refused(action: str, path: str, error: OSError) -> BackendError:
    """The error for what the system did not do with a path."""
    return BackendError(f"cannot {action} {path}: {error.strerror or error}")
