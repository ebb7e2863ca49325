"""The frames of many files, and whether what was kept of the files around their payloads is that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tlcore.hotpath.seals import ROW_BYTES, are_sealed

from .encode import Frame

Indices = np.ndarray[Any, np.dtype[np.int64]]


class FrameTable:
    """What stands around payloads, for files one after the other; `nbytes` together.

    ``spans`` ``[files, 3]`` are each file's size, and where its payload begins and ends.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        """Raises struct.error or OverflowError for sizes that no file has."""
        known: dict[int, int] = {}
        own: list[Frame] = []
        ids = []
        for frame in frames:
            number = known.setdefault(id(frame), len(own))
            if number == len(own):
                own.append(frame)
            ids.append(number)
        # Tensors have few forms: what belongs to one is worked out once.
        self._templates = b"".join(frame.text for frame in own)
        sizes = np.array([len(frame.text) for frame in own], np.int64)
        begins = (np.cumsum(sizes) - sizes).tolist()
        rows = [
            frame.seal.row(len(frame.text), begin, 0, 0, frame.payload_bytes)
            for frame, begin in zip(own, begins, strict=True)
        ]
        spans = [(each.size, len(each.head), len(each.head) + each.payload_bytes) for each in own]
        self.spans = np.array(spans, np.int64).reshape(-1, 3)[ids]
        self._rows = np.frombuffer(b"".join(rows), np.int64).reshape(-1, ROW_BYTES // 8)[ids]
        ends = np.cumsum(sizes[ids])
        self.nbytes = int(ends[-1]) if ids else 0
        self._places = ends - sizes[ids]

    def is_around(self, kept: bytearray, first: Sequence[int] | Indices) -> bool:
        """Whether each file has its frame, with the checksums of some payload.

        ``kept`` is what is around the payloads, one file's after the other's; of another name of an earlier
        file only that one's, whose index stands in ``first``.
        """
        rows = self._rows.copy()
        rows[:, 0] = self._places[np.asarray(first, np.int64)]
        return are_sealed(kept, self._templates, rows)
