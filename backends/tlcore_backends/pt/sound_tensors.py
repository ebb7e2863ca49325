"""Tensors that are proven sound while they are read: many files in one call, with what is around each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from tlcore.errors import ReadError
from tlcore.hotpath.gathering import gather_payloads
from tlcore.hotpath.reading import FILE_ALIGNMENT, Scratch, identities
from tlcore.protocols import Buffer

from .alike import UNUSUAL, frame_in
from .frame_table import FrameTable

_HASH = "xxh3-128:"
# What is read together is mostly less. One piece is read, one or two wait, one is looked at, one written.
_LEAST_PIECE, _MOST_PIECES = 5 << 20, 6
_NOTHING = memoryview(b"")


class SoundTensors:
    """The files of a run in ``directory``, read into memory that is used again when nobody looks at it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._scratch = Scratch(_MOST_PIECES, _LEAST_PIECE)

    def read(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Sequence[Buffer] | None:
        """As `SupportsReadSound` says; ``known`` has hashes by what hard links of a file share."""
        with suppress(OSError, *UNUSUAL):
            return self._read(records, known)
        return None

    def _read(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Sequence[Buffer] | None:
        """Raises one of `UNUSUAL`, or OSError, for what cannot be read so."""
        files = [_file(record) for record in records]
        states = identities([f"{self._directory}/{file}" for file in files])
        if None in states:
            return None
        forms = [
            (state, record["dtype"], tuple(record["shape"]))
            for state, record in zip(states, records, strict=True)
        ]
        is_alias = [record.get("alias_of") is not None for record in records]
        wanted = [
            index
            for index, record in enumerate(records)
            if not (is_alias[index] and known.get(forms[index]) == record["hash"])
        ]
        found: list[Buffer] = [_NOTHING] * len(records)
        if not wanted:
            return found
        frames = [frame_in(records[index]) for index in wanted]
        places, room = list[int](), 0
        for index, frame in zip(wanted, frames, strict=True):
            places.append(-1 if is_alias[index] else room)
            if not is_alias[index]:
                room += -(-frame.payload_bytes // FILE_ALIGNMENT) * FILE_ALIGNMENT
        memory = memoryview(self._scratch.take(room))
        hashes = [records[index]["hash"] for index in wanted]
        if not self._gather([files[index] for index in wanted], FrameTable(frames), places, hashes, memory):
            return None
        known |= zip((forms[index] for index in wanted), hashes, strict=True)
        for index, frame, place in zip(wanted, frames, places, strict=True):
            if place >= 0:
                found[index] = memory[place : place + frame.payload_bytes]
        return found

    def _gather(
        self,
        files: Sequence[str],
        table: FrameTable,
        places: Sequence[int],
        hashes: Sequence[str],
        memory: memoryview,
    ) -> bool:
        """Read payloads to their places; whether each file is what its record says, around them too."""
        kept = bytearray(table.nbytes)
        spans = np.column_stack((table.spans, np.array(places, np.int64)))
        read, digests = gather_payloads(self._directory, files, spans, kept, memory)
        first = np.frombuffer(read, np.int64)
        width = 2 * len(digests) // max(1, len(files))
        digits = digests.hex()
        stated = [f"{_HASH}{digits[at : at + width]}" for at in range(0, len(digits), width or 1)]
        return not (first < 0).any() and stated == list(hashes) and table.is_around(kept, first)


def _file(record: Mapping[str, Any]) -> str:
    file = record["file"]
    if type(file) is not str:
        raise ReadError("damaged record")
    return file
