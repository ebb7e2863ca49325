"""Hashing all tensors of a batch in one call, and putting together those that differ."""

from __future__ import annotations

import pytest
import torch

from tests.hotpath.halves import native


def test_hostile_places_are_refused() -> None:
    extension = native()
    memory = extension.Memory()
    store = torch.zeros(64, dtype=torch.uint8)
    memory.address, memory.size = store.data_ptr(), 64

    def numbers(*values: int) -> bytes:
        return torch.tensor(values, dtype=torch.int64).numpy().tobytes()

    addresses, hashes, firsts = extension.fingerprint(
        [memory] * 2, [0, 32], numbers(0, 1), numbers(32, 32), numbers(7, 7)
    )
    assert hashes[:16] == hashes[16:] and firsts == numbers(0, 0)
    for memories, offsets, places, sizes in (
        ([memory], [33], numbers(0), numbers(32)),
        ([memory], [-1], numbers(0), numbers(32)),
        ([memory], [0], numbers(0), numbers(-1)),
        ([memory], [0], numbers(-1), numbers(1)),
        ([object()], [0], numbers(0), numbers(1)),
        ([memory], [0], numbers(0), numbers(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"tensor|offset|sizes"):
            extension.fingerprint(memories, offsets, places, sizes, numbers(7))
    with pytest.raises(IndexError):
        extension.fingerprint([memory], [0], numbers(1), numbers(1), numbers(7))
    for target, sizes in (
        (31, numbers(32, 32)),
        (33, numbers(32, 32)),
        (32, numbers(32)),
        (0, numbers(-1, 32)),
    ):
        with pytest.raises(ValueError, match="fill the memory exactly"):
            extension.collect(bytearray(target), addresses, sizes, firsts)
