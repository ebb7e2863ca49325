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
# How often somebody else has set the limit: what was added to the one before is gone.
_era = 0


class StackRoom:
    """Raises Python's recursion limit, so that a captured model nests as deep as without capture."""

    def __init__(self) -> None:
        self._mine = 0
        self._era = 0

    def take(self, depth: int) -> None:
        """Make room for modules that are nested ``depth`` deep, until `give_back`; nothing where there is."""
        wanted = depth * _PER_LEVEL + _BELOW
        if wanted != self._mine or self._era != _era or sys.getrecursionlimit() != _set:
            self.give_back()
            with _lock:
                self._mine = wanted if _change(wanted) else 0
                self._era = _era

    def give_back(self) -> None:
        """Restore the limit, unless somebody else has set another one meanwhile."""
        with _lock:
            _look()
            if self._mine and self._era == _era:
                _change(-self._mine)
            self._mine = 0


def _look() -> int:
    """The limit now. One that is somebody's own wish holds."""
    global _added, _era
    limit = sys.getrecursionlimit()
    if _added and limit != _set:
        _added = 0
        _era += 1
    return limit


def _change(by: int) -> bool:
    global _added, _set
    limit = _look()
    try:
        sys.setrecursionlimit(limit + by)
    except (RecursionError, ValueError, OverflowError):
        # Too high, or deeper in already than the lower limit allows.
        return False
    _added += by
    _set = limit + by
    return True
