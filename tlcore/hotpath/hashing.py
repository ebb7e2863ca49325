"""XXH3-128 of many buffers, in one call that leaves the interpreter to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from .native import can_hash, extension


def _hex_digests(buffers: Sequence[Any]) -> list[str]:
    """The XXH3-128 of each buffer (C-contiguous bytes) in lower-case hex, in order."""
    return [xxhash.xxh3_128_hexdigest(each) for each in buffers]


hex_digests: Callable[[Sequence[Any]], list[str]] = extension.hex_digests if can_hash else _hex_digests
