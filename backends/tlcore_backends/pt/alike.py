"""Steps whose documents are alike: as texts they differ in the step's directory, in hashes, and in what is
no record. So that of one of them is proof for all, and the others need not become objects.

A text is only compared where that is proof: no escapes, and the directory nowhere but where the names of
tensors and of their files begin. What does not look like that is left to whoever looks at each step.
"""

from __future__ import annotations

import secrets
import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from tlcore.errors import ReadError
from tlcore.layout.hashes import HASH_PREFIX
from tlcore.layout.run_files import is_plain, parse
from tlcore.record import Json

from .encode import Frame, frame_of
from .frame_table import FrameTable

_RECORDS = b'"records":['
_LAST_FIELD = b'"file_bytes":'
_HASH = b'"hash":"' + HASH_PREFIX.encode()
_HEX_CHARS = 32
_NAMES = (b'"name":"', b'"file":"', b'"alias_of":"')
_FILES = (b'"file": "', b'"file":"')
_MOST_DIMENSIONS = 64
# What one call reads: between two a thread may have to wait for the interpreter, amid one nothing stops it.
# Opening a file takes as long as reading so many bytes.
_LEAST_OF_PART, _MOST_OF_PART = 16 << 20, 1 << 30
_COST_OF_FILE = 48 << 10
# Of a longer text some records are looked at before the others; who has so much to read may begin with them.
_LONG_TEXT, _EARLY_SHARE, EARLY_BYTES = 64 << 10, 8, 4 << 20
_NEXT = b'},{"name":"'
# What records that are not as `PtSink` writes them are found by.
UNUSUAL = (
    *(KeyError, TypeError, ValueError, OverflowError, AttributeError),
    *(RecursionError, MemoryError, ReadError, struct.error),
)
# Stands for the records in what is left of a document, where nobody could have written it.
_CUT = secrets.token_hex(16)


class StepText(NamedTuple):
    """A ``step.json``: its ``records`` as text, what of them another step of this ``kind`` has as well, the
    ``hashes`` that are left out of that, and the ``rest`` of the document.
    """

    records: bytes
    kind: bytes
    hashes: list[str]
    rest: Json


class _Divided(NamedTuple):
    """Where in a ``step.json`` its records are, what of them another step has as well, and their hashes."""

    begin: int
    end: int
    kind: bytes
    hashes: list[bytes]


def _divided(text: bytes, directory: bytes) -> _Divided | None:
    begin, end = text.find(_RECORDS) + len(_RECORDS) - 1, text.rfind(_LAST_FIELD)
    end = text.find(b"}]", end) + 2
    records = text[begin:end]
    if not len(_RECORDS) <= begin < end or not is_plain(records):
        return None
    first, *pieces = records.replace(directory, b"\0").split(_HASH)
    hashes = [piece[:_HEX_CHARS] for piece in pieces]
    if b"".join(hashes).translate(None, b"0123456789abcdef") or {_HEX_CHARS} != set(map(len, hashes)):
        return None
    return _Divided(begin, end, b"\1".join([first, *(piece[_HEX_CHARS:] for piece in pieces)]), hashes)


def divided(text: bytes, directory: bytes) -> tuple[int, int, bytes] | None:
    """Where a ``step.json`` has its records, and what of them is equal in steps that are alike.

    None where that cannot be told, or ``directory`` stands elsewhere than where names begin. What is around
    the records, with any value in their stead, may be no JSON.
    """
    found = _divided(text, directory)
    if found is None:
        return None
    records = text[found.begin : found.end]
    named = sum(records.count(key + directory) for key in _NAMES) == records.count(directory)
    return found[:3] if named else None


def cut(text: bytes, directory: bytes) -> StepText | None:
    """The parts of a ``step.json`` whose names begin with ``directory``; None where they cannot be told."""
    found = _divided(text, directory)
    if found is None:
        return None
    begin, end, kind, hashes = found
    records = text[begin:end]
    try:
        rest = parse(b'%s"%s"%s' % (text[:begin], _CUT.encode(), text[end:]), "")
    except ReadError:
        return None
    if not isinstance(rest, dict) or rest.get("records") != _CUT:
        return None
    return StepText(records, kind, [each.decode() for each in hashes], {**rest, "records": []})


class Part(NamedTuple):
    """Some of the files that steps of a kind have, which are read in one call."""

    begin: int
    end: int
    table: FrameTable


class Leader:
    """A step that others are compared with: `take` each of its `pieces`, then `finish`."""

    def __init__(self, step: StepText, directory: str) -> None:
        self._step, self._directory = step, directory
        self.calls = step.rest["calls"]
        self.records: list[Json] = []
        self.files: list[str] = []
        self.frames: list[Frame] = []
        # What reading the files costs in bytes, up to each of them.
        self.costs: list[int] = []
        # What other files a step has is told by who lists them, before it is asked for `texts_of`.
        self.structures: list[str] = []
        self.texts = b""

    @classmethod
    def of(cls, step: StepText, directory: str) -> Leader:
        """All of a step. Raises one of `UNUSUAL` where a record is not as `PtSink` writes it."""
        found = cls(step, directory)
        for piece in found.pieces():
            found.take(piece)
        found.finish()
        return found

    def pieces(self) -> Iterator[bytes]:
        """The texts of the records, an array each; few of them in the first of a long text."""
        text = self._step.records
        at = text.find(_NEXT, len(text) // _EARLY_SHARE) if len(text) >= _LONG_TEXT else -1
        if at < 0:
            yield text
        else:
            # Without escapes a quotation mark ends a text, so that this is between two objects; or it is
            # within one, and then neither piece is JSON.
            yield text[: at + 1] + b"]"
            yield b"[" + text[at + 2 :]

    def take(self, piece: bytes) -> None:
        """Look at the records of a piece. Raises one of `UNUSUAL`."""
        records = parse(piece, "")
        directory, cost = self._directory, self.costs[-1] if self.costs else 0
        self.files += [_within(directory, record["file"]) for record in records]
        frames = [frame_in(record) for record in records]
        for record, frame in zip(records, frames, strict=True):
            cost += _COST_OF_FILE + (frame.size if record.get("alias_of") is None else 0)
            self.costs.append(cost)
        self.frames += frames
        self.records += records

    def finish(self) -> None:
        """Look at what all records have together. Raises one of `UNUSUAL`."""
        begin, text = self._directory.encode(), self._step.records
        if sum(text.count(key + begin) for key in _NAMES) != text.count(begin):
            raise ValueError("the directory stands somewhere else")
        if [record["hash"].rpartition(":")[2] for record in self.records] != self._step.hashes:
            raise ValueError("a record has no hash of its own")

    @cached_property
    def originals(self) -> list[int]:
        """For each record its own index, or that of the one whose bytes it shares.

        Raises ValueError where that is none before it of the same dtype and shape.
        """
        known: dict[str, int] = {}
        found = []
        for index, record in enumerate(self.records):
            alias = record.get("alias_of")
            original = index if alias is None else known.get(alias, -1)
            own, other = ((each["dtype"], each["shape"]) for each in (record, self.records[original]))
            if original < 0 or own != other:
                raise ValueError(f"{record['name']} is no alias of {alias!r}")
            found.append(original)
            known[record["name"]] = found[original]
        return found

    def parts(self, threads: int, begin: int = 0) -> list[Part]:
        """All files, or those from ``begin`` on, shared among so many threads.

        Raises one of `UNUSUAL` for sizes that no file has.
        """
        ends = self.costs[begin:]
        total = self.costs[-1] if ends else 0
        base = self.costs[begin - 1] if begin else 0
        # One thread has begun already, and takes of what is left as much less.
        most = total // (2 * threads) if begin else -(-total // threads)
        count = -(-(total - base) // min(max(_LEAST_OF_PART, most), _MOST_OF_PART))
        # As much in each: who is done first waits for the others.
        shares = (base + (total - base) * number // count for number in range(count))
        edges = [begin + bisect_left(ends, share) for share in shares]
        return [self.part(*each) for each in pairwise([*edges, len(self.costs)]) if each[0] < each[1]]

    def part(self, begin: int, end: int) -> Part:
        """Some of the files."""
        return Part(begin, end, FrameTable(self.frames[begin:end]))

    def texts_of(self, directory: str, suffix: str) -> list[str]:
        """The files that a step needs beside tensors and ``step.json``; ``suffix`` is a rank's."""
        return text_files(self.structures, directory, suffix)

    def learn(self, texts: Sequence[bytes | None], directory: str) -> None:
        """Remember its other files; none where no other step's can be told to be alike."""
        found = together(texts, directory) or b""
        if sum(found.count(key + b"\0") for key in _FILES) == found.count(b"\0"):
            self.texts = found


def text_files(structures: Sequence[str], directory: str, suffix: str) -> list[str]:
    """The call order of a step and these of its structures, as files; ``suffix`` is a rank's."""
    names = [f"{directory}{name}{suffix}.json" for name in structures]
    return [f"{directory}module_calls{suffix}.txt", *names]


def together(texts: Sequence[bytes | None], directory: str) -> bytes | None:
    """All texts without the directory, one after the other; None where they cannot be told apart."""
    # No JSON text has this byte.
    text = b"\1".join(text for text in texts if text is not None)
    return text.replace(directory.encode(), b"\0") if None not in texts and is_plain(text) else None


def _within(directory: str, name: str) -> str:
    if not name.startswith(directory):
        raise ValueError(f"{name!r} is of another step")
    return name[len(directory) :]


def frame_in(record: Mapping[str, Any]) -> Frame:
    """What is around the payload of a record's tensor. Raises one of `UNUSUAL` where its sizes are others."""
    shape = record["shape"]
    # True and 1 are equal to whoever remembers frames, and not to whoever makes them.
    if len(shape) > _MOST_DIMENSIONS or not {int}.issuperset(map(type, shape)):
        raise ValueError("no shape")
    frame = frame_of(record["dtype"], shape)
    if (record["bytes"], record["file_bytes"]) != (frame.payload_bytes, frame.size):
        raise ValueError("another size")
    return frame
