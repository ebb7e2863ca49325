"""Memory to read into, used again only when nobody looks at it any more."""

from __future__ import annotations

import threading

import torch

from tlcore.hotpath.reading import Scratch


def test_memory_is_used_again_once_nobody_holds_a_view() -> None:
    scratch = Scratch()
    first = scratch.take(100)
    address = id(first)
    view = memoryview(first)[10:20]
    tensor = torch.frombuffer(memoryview(first), dtype=torch.uint8)
    for _ in range(2):
        assert scratch.take(50) is not first
    del first
    view.release()
    # The tensor alone still needs the bytes.
    assert tensor.numel() == 100 and id(scratch.take(100)) != address


def test_it_is_the_same_memory_while_it_is_free_and_large_enough() -> None:
    scratch = Scratch()
    first = scratch.take(100)
    assert scratch.take(100) is first and scratch.take(60) is first
    assert scratch.take(101) is not first and len(scratch.take(101)) >= 101


def test_a_few_pieces_are_kept_for_who_reads_ahead() -> None:
    scratch = Scratch()
    held = [memoryview(scratch.take(100)) for _ in range(5)]
    assert len({id(view.obj) for view in held}) == 5
    last = {id(view.obj) for view in held[-4:]}
    for view in held:
        view.release()
    again = [memoryview(scratch.take(100)) for _ in range(4)]
    assert {id(view.obj) for view in again} == last


def test_each_thread_has_its_own_and_what_is_very_large_is_not_kept() -> None:
    scratch = Scratch()
    here, there = scratch.take(10), []
    thread = threading.Thread(target=lambda: there.append(scratch.take(10)))
    thread.start()
    thread.join(10)
    assert there and there[0] is not here
    assert len(scratch.take(17 << 20)) == 17 << 20 and scratch.take(10) is here
