"""Room on the interpreter's stack for what capture adds to each level of nested modules."""

from __future__ import annotations

import sys
import threading

# What a stand-in adds to each call, as the interpreter counts, and what capture itself needs below the last.
_PER_LEVEL = 4
_BELOW = 100

_lock = threading.Lock()
_added = 0
_set = 0


class StackRoom:
    """Raises Python's recursion limit while a step runs, so that a model nests as deep as without capture."""

    def __init__(self) -> None:
        self._mine = 0

    def take(self, depth: int) -> None:
        """Make room for modules that are nested ``depth`` deep; once until `give_back`."""
        if not self._mine:
            self._mine = depth * _PER_LEVEL + _BELOW
            _change(self._mine)

    def give_back(self) -> None:
        """Restore the limit, unless somebody else has set another one meanwhile."""
        if self._mine:
            _change(-self._mine)
            self._mine = 0


def _change(by: int) -> None:
    global _added, _set
    with _lock:
        limit = sys.getrecursionlimit()
        if _added and limit != _set:
            # Somebody's own wish: it holds, and what was added to the limit before is gone.
            _added = 0
        if not _added and by < 0:
            return
        _added += by
        try:
            sys.setrecursionlimit(limit + by)
        except (RecursionError, ValueError, OverflowError):
            # Deeper in already than the lower limit allows.
            _added -= by
            return
        _set = limit + by
