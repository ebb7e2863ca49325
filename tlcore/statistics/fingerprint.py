"""A content hash that every device computes alike.

The hashes in common use go through the bytes one after the other, which a GPU cannot do fast. Here each
block of 32-bit words is multiplied with fixed random 64-bit keys and summed, modulo 2**64, three times with
different keys (multilinear hashing); the sums of all blocks, with dtype and shape, are hashed by xxh3-128.
Two different blocks have the same three sums with a probability of at most 2**-99.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import xxhash

LANES = 3
WORD_BYTES = 4
BLOCK_WORDS = 1 << 16
BLOCK_BYTES = BLOCK_WORDS * WORD_BYTES
_PREFIX = "ml-xxh3-128:"
Ints = npt.NDArray[np.int64]


@cache
def keys() -> Ints:
    """The keys, ``LANES`` times ``BLOCK_WORDS``: the output of SplitMix64 from seed 0."""
    state = np.arange(1, LANES * BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Ints = (state ^ (state >> np.uint64(31))).view(np.int64).reshape(LANES, BLOCK_WORDS)
    return found


def blocks_of(nbytes: int) -> int:
    """How many blocks a tensor of ``nbytes`` bytes has."""
    return -(-nbytes // BLOCK_BYTES)


def digest(sums: Ints, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """The hash of a tensor from the sums of its blocks (``blocks`` times ``LANES``)."""
    text = f"{dtype} {tuple(shape)} ".encode()
    return _PREFIX + xxhash.xxh3_128_hexdigest(text + sums.tobytes())
