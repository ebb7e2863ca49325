"""The tables of a segment's index, from anybody.

What reads them holds these and never the index, which is large: nobody is to wait for the garbage collector.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tlcore.errors import ReadError

from .array_places import LARGEST, number_of
from .segment_names import is_data
from .shared_arrays import OwnArrays
from .skeletons import Skeletons

NAMES = ("files", "calls", "structures", "arrays", "plans", "extents", "skeletons", "changes", "rows")


class Tables:
    """The tables of a document; ``where`` is the index's name for messages. Raises ReadError."""

    def __init__(self, document: Any, where: str) -> None:
        self._where = where
        if not isinstance(document, dict) or document.get("layout") != 2:
            raise self.damaged("not an index of layout version 2")
        for key in NAMES:
            if not isinstance(document.get(key), (list, OwnArrays, Skeletons)):
                raise self.damaged(f"{key!r} is missing or no array")
        self._document: Mapping[str, Any] = document

    def damaged(self, what: str) -> ReadError:
        """The error for an index that makes no sense."""
        return ReadError(f"{self._where}: damaged index, {what}")

    def entry(self, table: str, number: Any) -> Any:
        """An entry of one of the tables."""
        entries = self._document[table]
        if type(number) is not int or not 0 <= number < len(entries):
            raise self.damaged(f"{table!r} has no entry {str(number)[:40]}")
        return entries[number]

    def count(self, table: str) -> int:
        """How many entries a table has."""
        return len(self._document[table])

    @cached_property
    def heads(self) -> list[str | None]:
        """The hash of what stands before the tensors of each data file; None of earlier versions."""
        found: list[str | None] = []
        for entry in self._document["files"]:
            head = entry.get("head") if isinstance(entry, dict) else None
            if head is not None and not isinstance(head, str):
                raise self.damaged("the hash of a file's head is none")
            found.append(head)
        return found

    @cached_property
    def files(self) -> list[tuple[str, int]]:
        """The data files and their sizes in bytes."""
        found: dict[str, int] = {}
        for entry in self._document["files"]:
            name = entry.get("file") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not is_data(name) or name in found:
                raise self.damaged("a file has no name that is its own")
            found[name] = number_of(entry.get("bytes"), self.damaged, LARGEST)
        return list(found.items())
