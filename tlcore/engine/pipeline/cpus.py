"""The processors that threads in the background may run on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from multiprocessing import parent_process

# By these OpenMP binds its threads, and with them the one that started the program.
_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


@contextlib.contextmanager
def unbound() -> Iterator[None]:
    """Threads that are started within may run wherever this process may.

    OpenMP binds the thread that runs a model to one processor, as each worker of vLLM does on CPUs, and a
    thread inherits that from the one which starts it: capture would run on just the processor that it is to
    leave to the model. Any other affinity is somebody's wish, and is kept.
    """
    own, all_of_process = _affinities()
    if own == all_of_process:
        yield
        return
    os.sched_setaffinity(0, all_of_process)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _affinities() -> tuple[set[int], set[int]]:
    """The processors of this thread; and those that its process may use, where OpenMP has bound the thread.

    A child of `multiprocessing` may use what its parent may, which OpenMP has not bound.
    """
    if sys.platform != "linux":
        return set(), set()
    own = os.sched_getaffinity(0)
    everywhere = set(own)
    if any(name in os.environ for name in _BINDING):
        parent = parent_process()
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        for each in [*threads, *([] if parent is None or parent.pid is None else [parent.pid])]:
            # It may just have ended.
            with contextlib.suppress(OSError):
                everywhere |= os.sched_getaffinity(each)
    return own, everywhere
