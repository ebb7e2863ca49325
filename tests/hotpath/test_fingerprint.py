"""Hashing all tensors of a batch in one call, and putting together those that differ."""

from __future__ import annotations

import numpy as np
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


@pytest.mark.parametrize("begin", [0, 1, 15, 63])
@pytest.mark.parametrize("least", [0, 1 << 20], ids=["few bytes", "many bytes"])
def test_what_is_collected_is_all_and_nothing_else(begin: int, least: int) -> None:
    source = np.random.default_rng(begin).integers(0, 256, 40_000 + least, np.uint8)
    sizes = np.array([*range(200), 9216, 0, 64, 127, 128, 129, least, 5000], np.int64)
    places = np.minimum(np.arange(len(sizes)) * 37, len(source) - sizes)
    firsts = np.arange(len(sizes))
    firsts[3] = 2
    expected = b"".join(
        source[place : place + size].tobytes()
        for number, (place, size) in enumerate(zip(places, sizes, strict=True))
        if firsts[number] == number
    )
    target = np.full(len(expected) + begin + 100, 7, np.uint8)
    native().collect(
        target[begin : begin + len(expected)], source.ctypes.data + places.astype(np.int64), sizes, firsts
    )
    assert target.tobytes() == b"\7" * begin + expected + b"\7" * 100
