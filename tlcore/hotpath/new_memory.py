"""Memory that is new to the process, in large pages where the system has some at hand."""

from __future__ import annotations

import contextlib
import mmap
import time

# Private, so that a forked child can never write into what the parent is about to store.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# As large as a large page is on common systems.
_PAGE_BYTES = 2 << 20
# A page of 2 MiB that is at hand takes a quarter of a millisecond to fill with zeros. One that the system
# puts together of memory that is in pieces, or that a virtual machine has to get from its host, takes 4: five
# times as long as 512 small pages.
_SLOW_S = 1e-3


def new_memory(nbytes: int) -> mmap.mmap:
    """Zeros, which take up memory only once they are written (of 8 MiB or more, one large page does at once).

    Large pages save most page faults, but only while there are some. So one is tried: where that takes long,
    the memory is in small pages.
    """
    memory = mmap.mmap(-1, nbytes, **_PRIVATE)
    if nbytes >= 4 * _PAGE_BYTES and hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Some kernels are built without them and refuse.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
            begin = time.perf_counter()
            # Whatever page it lies in is within the memory.
            memory[_PAGE_BYTES] = 0
            if time.perf_counter() - begin > _SLOW_S:
                memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
