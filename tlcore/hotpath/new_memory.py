"""Memory that is new to the process, in large pages where the system has some at hand."""

from __future__ import annotations

import contextlib
import mmap
import time

# Private, so that a forked child can never write into what the parent is about to store.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# Linux's MADV_POPULATE_WRITE, from 5.14 on.
_POPULATE_WRITE = 23
# As large as a large page is on common systems.
PAGE_BYTES = 2 << 20
# Less is in small pages.
LEAST_LARGE = 4 * PAGE_BYTES
# A page of 2 MiB that is at hand takes a quarter of a millisecond to fill with zeros. One that the system
# puts together of memory that is in pieces, or that a virtual machine has to get from its host, takes 4: five
# times as long as 512 small pages.
_SLOW_S = 1e-3
# So much is left to the next capture of this process, and up to where each piece was taken up.
MOST_SPARE = 384 << 20
_spare: list[tuple[mmap.mmap, int]] = []


def new_memory(nbytes: int) -> mmap.mmap:
    """Zeros, which take up memory only once they are written (of 8 MiB or more, one large page does at once).

    Large pages save most page faults, but only while there are some. So one is tried: where that takes long,
    the memory is in small pages.
    """
    memory = untouched_memory(nbytes)
    if nbytes >= LEAST_LARGE:
        # Whatever page it lies in is within the memory.
        touch(memory, PAGE_BYTES, 2 * PAGE_BYTES)
    return memory


def untouched_memory(nbytes: int) -> mmap.mmap:
    """The same in whatever pages the system chooses, of which none is taken up yet."""
    return mmap.mmap(-1, nbytes, **_PRIVATE)


def leave_spare(memory: mmap.mmap, taken_up: int) -> None:
    """Leave memory that nobody uses to who asks for so much next, or to the system when it is short of it.

    What it held may be gone then; else to write it again costs no page faults. Where the system knows no such
    thing, it gets the memory at once. There is no lock, which a fork might find taken.
    """
    if sum(size for _, size in _spare) + taken_up > MOST_SPARE:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory.madvise(mmap.MADV_FREE)
        _spare.append((memory, taken_up))


def take_spare(nbytes: int) -> tuple[mmap.mmap, int] | None:
    """Memory of exactly this size that was left, and up to where it is taken up; None where there is none."""
    for each in tuple(_spare):
        if len(each[0]) == nbytes:
            # Another thread may have been faster.
            with contextlib.suppress(ValueError):
                _spare.remove(each)
                return each
    return None


def touch(memory: mmap.mmap, begin: int, end: int) -> bool:
    """Take new memory up in large pages, from ``begin`` to ``end``, where it is to be written next.

    False where one of them took long, or there are none: all that is not taken up is in small pages then.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return False
    # Some kernels are built without them and refuse.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
        for place in range(begin, end, PAGE_BYTES):
            before = time.perf_counter()
            memory[place] = 0
            if time.perf_counter() - before > _SLOW_S:
                memory.madvise(mmap.MADV_NOHUGEPAGE)
                return False
        return True
    return False


def take_up(memory: mmap.mmap, begin: int, end: int, in_large_pages: bool) -> bool:
    """Take new memory up, from ``begin``, a multiple of PAGE_BYTES, to ``end``, which is to be written next.

    To do so at once takes two thirds of what it takes page by page, as each is written. Returns whether to
    ask for large pages next time, too.
    """
    if in_large_pages and touch(memory, begin, end):
        return True
    # Older kernels refuse, and other systems.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory.madvise(_POPULATE_WRITE, begin, end - begin)
    return False
