"""Tensors that are proven sound while they are read: many files in one call, with what is around each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from tlcore.errors import ReadError
from tlcore.hotpath.gathering import gather_payloads
from tlcore.hotpath.reading import FILE_ALIGNMENT, Scratch, identities
from tlcore.layout.hashes import HASH_BYTES, HASH_PREFIX
from tlcore.protocols import Buffer

from .alike import UNUSUAL, frame_in
from .frame_table import FrameTable

# What is read together is mostly less. One piece is read, one or two wait, one is looked at, one written.
_LEAST_PIECE, _MOST_PIECES = 4224 << 10, 6
_NOTHING = memoryview(b"")


class SoundTensors:
    """The files of a run in ``directory``, read into memory that is used again when nobody looks at it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._scratch = Scratch(_MOST_PIECES, _LEAST_PIECE)

    def prepared(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Callable[[], Sequence[Buffer] | None] | None:
        """As `SupportsReadSound` says; ``known`` has hashes by what hard links of a file share."""
        with suppress(OSError, *UNUSUAL):
            return partial(_read, _Files(self._directory, records, known), self._scratch)
        return None


def _read(files: _Files, scratch: Scratch) -> Sequence[Buffer] | None:
    with suppress(OSError, *UNUSUAL):
        return files.read(memoryview(scratch.take(files.nbytes)))
    return None


class Looked:
    """The files of some records before they are read: ``names``, ``hashes`` (16 bytes each) and ``frames``.

    ``wanted`` are the numbers of those that have to be read; the others are aliases whose files are proven,
    or will be.
    """

    def __init__(
        self, directory: str, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> None:
        """Raises one of `UNUSUAL` for what cannot be read so."""
        self.names = [_file(record) for record in records]
        states = identities([f"{directory}/{name}" for name in self.names])
        if None in states:
            raise ReadError("a file is missing")
        self.wanted = list[int]()
        for index, (record, state) in enumerate(zip(records, states, strict=True)):
            form, stated = (state, record["dtype"], tuple(record["shape"])), record["hash"]
            if record.get("alias_of") is None or known.get(form) != stated:
                known[form] = stated
                self.wanted.append(index)
        self.frames = list(map(frame_in, records))
        self.hashes = _digests([record["hash"] for record in records])


class _Files:
    """The files of some records: everything about them is worked out before they are read."""

    def __init__(
        self, directory: str, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> None:
        """Raises one of `UNUSUAL` for what cannot be read so."""
        looked = Looked(directory, records, known)
        self._directory, self._count = directory, len(records)
        self._wanted = looked.wanted
        self._names = [looked.names[index] for index in self._wanted]
        frames = [looked.frames[index] for index in self._wanted]
        places, self.nbytes = list[int](), 0
        for index, frame in zip(self._wanted, frames, strict=True):
            is_alias = records[index].get("alias_of") is not None
            places.append(-1 if is_alias else self.nbytes)
            if not is_alias:
                self.nbytes += -(-frame.payload_bytes // FILE_ALIGNMENT) * FILE_ALIGNMENT
        each = list(_each(looked.hashes))
        self._hashes = b"".join([each[index] for index in self._wanted])
        self._table = FrameTable(frames)
        self._spans = np.column_stack((self._table.spans, np.array(places, np.int64)))
        self._parts = [
            (place, place + frame.payload_bytes) for place, frame in zip(places, frames, strict=True)
        ]

    def read(self, memory: memoryview) -> Sequence[Buffer] | None:
        """The records' bytes in ``memory``, of at least `nbytes`; None where a file is another."""
        if self._wanted and not self._gather(memory):
            return None
        found: list[Buffer] = [_NOTHING] * self._count
        for index, (begin, end) in zip(self._wanted, self._parts, strict=True):
            if begin >= 0:
                found[index] = memory[begin:end]
        return found

    def _gather(self, memory: memoryview) -> bool:
        """Read payloads to their places; whether each file is what its record says, around them too."""
        kept = bytearray(self._table.nbytes)
        read, digests = gather_payloads(self._directory, self._names, self._spans, kept, memory)
        first = np.frombuffer(read, np.int64)
        return not (first < 0).any() and digests == self._hashes and self._table.is_around(kept, first)


def _digests(hashes: Sequence[str]) -> bytes:
    """Hashes as records state them. Raises ValueError for another kind."""
    digits = [each.removeprefix(HASH_PREFIX) for each in hashes]
    found = bytes.fromhex("".join(digits))
    if [f"{HASH_PREFIX}{each.hex()}" for each in _each(found)] != list(hashes):
        raise ValueError("a hash of another kind")
    return found


def _each(digests: bytes) -> Iterator[bytes]:
    return (digests[at : at + HASH_BYTES] for at in range(0, len(digests), HASH_BYTES))


def _file(record: Mapping[str, Any]) -> str:
    file = record["file"]
    if type(file) is not str:
        raise ReadError("damaged record")
    return file
