"""What a reader keeps of a run while it is read: the last documents, and which kinds of them are sound."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

# Those of a step that many ranks wrote are needed together.
_MOST_DOCUMENTS = 64
_MOST_SOUND = 1 << 17
_T = TypeVar("_T")


class Kept(OrderedDict[tuple[int, int], _T], Generic[_T]):
    """The last few by step and rank."""

    def keep(self, key: tuple[int, int], value: _T) -> _T:
        """Keep a value, which is returned, and forget the oldest."""
        self[key] = value
        if len(self) > _MOST_DOCUMENTS:
            # Another thread may have been here first.
            with contextlib.suppress(KeyError):
                self.popitem(last=False)
        return value


class Sound:
    """What was found to be sound and need not be looked at again, by what it is known by; not for ever."""

    def __init__(self) -> None:
        self._known: set[Hashable] = set()

    def has(self, *what: Hashable | None) -> bool:
        """Whether it was found sound; False where a part of what it is known by is not known."""
        return what in self._known

    def add(self, *what: Hashable | None) -> None:
        """Note it, unless there is nothing to know it by."""
        if len(self._known) >= _MOST_SOUND:
            self._known.clear()
        if None not in what:
            self._known.add(what)
