"""A local directory that gets its name once all that belongs into it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from tlcore.hotpath.making import FILE_MODE, NO_HARD_LINKS, make_files
from tlcore.storage import Folder

from .directories import DIRECTORY_MODE, refused


class UnfinishedFolder:
    """A directory under a temporary name; its methods may be called by several threads at once.

    Each raises BackendError; then, or when it is not wanted any more, call `abandon`.
    """

    def __init__(self, path: str, target: str) -> None:
        """Make it. Raises OSError."""
        self._path, self._target = path, target
        os.mkdir(path, DIRECTORY_MODE)

    def make(self, folder: Folder) -> None:
        """Make files, and directories for them, none of which is there."""
        try:
            make_files(self._path, *folder)
        except OSError as error:
            raise refused("write", self._target, error) from error

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        """Give each file of the first names a second one; where links are refused, that is a copy."""
        try:
            for origin, name in names:
                self._link(f"{self._path}/{origin}", f"{self._path}/{name}")
        except OSError as error:
            raise refused("write", self._target, error) from error

    def _link(self, origin: str, place: str) -> None:
        try:
            os.link(origin, place, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            shutil.copyfile(origin, place)
            os.chmod(place, FILE_MODE)

    def publish(self) -> None:
        """Give the directory its name."""
        try:
            os.rename(self._path, self._target)
        except OSError as error:
            raise refused("write", self._target, error) from error

    def abandon(self) -> None:
        """Remove it with all that is in it; nothing happens to one that was published."""
        shutil.rmtree(self._path, ignore_errors=True)
