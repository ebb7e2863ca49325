"""Making very many objects that last, which Python's garbage collector would look at again and again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A full collection after a good many million objects, so that what other threads drop in cycles is found.
_SELDOM = 1000
_lock = threading.Lock()
_inside = 0
_before = 0


@contextmanager
def lasting_objects() -> Iterator[None]:
    """Within, what has lasted is seldom looked at; young objects are, as ever. Also from several threads.

    Results and records are dictionaries without cycles, a million of them for a long run: full collections
    take longer than all else that is done with them, and find nothing.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = gc.get_threshold()[2]
            gc.set_threshold(*gc.get_threshold()[:2], _SELDOM)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            # Unless somebody has set another one meanwhile.
            if not _inside and gc.get_threshold()[2] == _SELDOM:
                gc.set_threshold(*gc.get_threshold()[:2], _before)
