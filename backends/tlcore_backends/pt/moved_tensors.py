"""Tensors that are proven sound while they are written into another file, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from tlcore.hotpath.moving import move_payloads
from tlcore.hotpath.reading import Scratch
from tlcore.layout.hashes import HASH_BYTES

from .alike import UNUSUAL
from .encode import Frame
from .frame_table import FrameTable
from .sound_tensors import Looked

# What a processor's own cache has room for, beside all else.
_PIECE_BYTES = 256 << 10


class MovedTensors:
    """What moves some records' tensors, as `SupportsMoveSound` says."""

    def __init__(
        self,
        directory: str,
        scratch: Scratch,
        records: Sequence[Mapping[str, Any]],
        known: dict[Hashable, str],
    ) -> None:
        """Raises OSError or one of `UNUSUAL` for what cannot be read so."""
        looked = Looked(directory, records, known)
        self._directory, self._scratch = directory, scratch
        # Aliases of what is moved, too.
        self._proven = set(range(len(records))).difference(looked.wanted)
        self._names, self._frames, self._hashes = looked.names, looked.frames, looked.hashes

    def __call__(self, numbers: Sequence[int], places: Sequence[int]) -> Callable[[int], bool]:
        """What writes the tensors of these records to their places in a file, given its handle."""
        told = zip(numbers, places, strict=True)
        wanted = [(number, place) for number, place in told if place >= 0 or number not in self._proven]
        files = [(self._names[number], self._frames[number], place) for number, place in wanted]
        hashes = b"".join(
            [self._hashes[HASH_BYTES * number : HASH_BYTES * (number + 1)] for number, _ in wanted]
        )
        return partial(_move, self._directory, files, hashes, self._scratch)


def _move(
    directory: str, files: Sequence[tuple[str, Frame, int]], hashes: bytes, scratch: Scratch, handle: int
) -> bool:
    if not files:
        return True
    with suppress(*UNUSUAL):
        table = FrameTable([frame for _, frame, _ in files])
        spans = np.column_stack((table.spans, np.array([place for *_, place in files], np.int64)))
        names = [name for name, *_ in files]
        kept = bytearray(table.nbytes)
        with memoryview(scratch.take(_PIECE_BYTES)) as memory, memory[:_PIECE_BYTES] as room:
            digests = move_payloads(directory, names, spans, kept, room, handle)
        return digests == hashes and table.is_around(kept, np.arange(len(files)))
    return False
