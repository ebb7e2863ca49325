"""New memory is zeros of a process's own, in large pages only where those are at hand."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys

import numpy as np
import pytest

from tlcore.hotpath import new_memory as module
from tlcore.hotpath.new_memory import leave_spare, new_memory, take_spare

SIZES = [1, 2 << 20, (8 << 20) - 1, 8 << 20, (32 << 20) + 5]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_zeros_and_can_be_written(size: int) -> None:
    with new_memory(size) as memory:
        assert len(memory) == size and not any(memory[:: max(1, size // 1000)])
        memory[size - 1] = 7
        assert memory[-1] == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
def test_a_forked_child_writes_into_its_own() -> None:
    with new_memory(8 << 20) as memory:
        child = os.fork()
        if not child:
            memory[0] = 1
            os._exit(0)
        os.waitpid(child, 0)
        assert memory[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a map asked for is told by Linux")
@pytest.mark.parametrize("slow", [False, True])
def test_large_pages_are_asked_for_where_one_comes_soon(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as asking:
        with contextlib.suppress(OSError):
            asking.madvise(mmap.MADV_HUGEPAGE)
        if _flag_of(asking) != "hg":
            pytest.skip("this kernel has no large pages, or does not tell")
    times = iter([0.0, 1.0 if slow else 1e-6])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    memory = new_memory(64 << 20)
    assert _flag_of(memory) == ("nh" if slow else "hg")


@pytest.fixture
def nothing_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_spare", [])


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system knows no spare memory")
def test_what_is_left_is_for_whoever_wants_as_much(
    nothing_spare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (8 << 20, 9 << 20, 9 << 20)
    memories = [new_memory(size) for size in sizes]
    monkeypatch.setattr(module, "MOST_SPARE", sum(sizes[:2]))
    for memory, size in zip(memories, sizes, strict=True):
        leave_spare(memory, size - 5)
    assert take_spare(10 << 20) is None
    assert take_spare(9 << 20) == (memories[1], (9 << 20) - 5)
    # Beyond the bound nothing is left.
    assert take_spare(9 << 20) is None and take_spare(8 << 20) == (memories[0], (8 << 20) - 5)
    memories[1][:3] = b"abc"
    assert memories[1][:3] == b"abc" and take_spare(8 << 20) is None


def _flag_of(memory: mmap.mmap) -> str:
    """Whether a map asked for large pages (``hg``) or for none (``nh``)."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return next(iter({"hg", "nh"} & set(line.split())), "none")
    return "not there"
