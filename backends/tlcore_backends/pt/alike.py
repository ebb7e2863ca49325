"""Steps whose documents are alike: as texts they differ in the step's directory, in hashes, and in what is
no record. So that of one of them is proof for all, and the others need not become objects.

A text is only compared where that is proof: no escapes, and the directory nowhere but where the names of
tensors and of their files begin. What does not look like that is left to whoever looks at each step.
"""

from __future__ import annotations

import json
import secrets
import struct
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from tlcore.errors import ReadError
from tlcore.layout.run_files import is_plain, parse
from tlcore.record import Json

from .encode import Frame, frame_of
from .frame_table import FrameTable

_RECORDS = b'"records":['
_LAST_FIELD = b'"file_bytes":'
_HASH = b'"hash":"xxh3-128:'
_HEX_CHARS = 32
_NAMES = (b'"name":"', b'"file":"', b'"alias_of":"')
_FILES = (b'"file": "', b'"file":"')
_MOST_DIMENSIONS = 64
# What one call reads: between two a thread may have to wait for the interpreter, amid one nothing stops it.
# Opening a file takes as long as reading so many bytes.
_LEAST_OF_PART, _MOST_OF_PART = 16 << 20, 1 << 30
_COST_OF_FILE = 48 << 10
# What records that are not as `PtSink` writes them are found by.
UNUSUAL = (
    *(KeyError, TypeError, ValueError, OverflowError, AttributeError),
    *(RecursionError, MemoryError, struct.error),
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
    """A step that others are compared with."""

    def __init__(self, step: StepText, directory: str) -> None:
        """Raises one of `UNUSUAL` where a record is not as `PtSink` writes it."""
        begin = directory.encode()
        records = json.loads(step.records)
        if sum(step.records.count(key + begin) for key in _NAMES) != step.records.count(begin):
            raise ValueError("the directory stands somewhere else")
        if [record["hash"].rpartition(":")[2] for record in records] != step.hashes:
            raise ValueError("a record has no hash of its own")
        self.calls = step.rest["calls"]
        self.files = [_within(directory, record["file"]) for record in records]
        self.frames = [_frame(record) for record in records]
        self.has_own_bytes = [record.get("alias_of") is None for record in records]
        needed = {
            f"{_within(directory, record['name']).rpartition('/')[0]}/{record['direction']}"
            for record in records
        }
        self.structures = sorted(needed)
        self._records = records
        self.texts = b""

    @cached_property
    def originals(self) -> list[int]:
        """For each record its own index, or that of the one whose bytes it shares.

        Raises ValueError where that is none before it of the same dtype and shape.
        """
        known: dict[str, int] = {}
        found = []
        for index, record in enumerate(self._records):
            alias = record.get("alias_of")
            original = index if alias is None else known.get(alias, -1)
            own, other = ((each["dtype"], each["shape"]) for each in (record, self._records[original]))
            if original < 0 or own != other:
                raise ValueError(f"{record['name']} is no alias of {alias!r}")
            found.append(original)
            known[record["name"]] = found[original]
        return found

    def parts(self, threads: int) -> list[Part]:
        """All files, shared among so many threads. Raises one of `UNUSUAL` for sizes that no file has."""
        costs = [
            _COST_OF_FILE + (frame.size if own else 0)
            for frame, own in zip(self.frames, self.has_own_bytes, strict=True)
        ]
        ends = list(accumulate(costs))
        total = ends[-1] if ends else 0
        count = -(-total // min(max(_LEAST_OF_PART, -(-total // threads)), _MOST_OF_PART))
        # As much in each: who is done first waits for the others.
        edges = [bisect_left(ends, total * number // count) for number in range(count)]
        return [
            Part(begin, end, FrameTable(self.frames[begin:end]))
            for begin, end in pairwise([*edges, len(costs)])
            if begin < end
        ]

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


def _frame(record: Json) -> Frame:
    shape = record["shape"]
    # True and 1 are equal to whoever remembers frames, and not to whoever makes them.
    if len(shape) > _MOST_DIMENSIONS or not {int}.issuperset(map(type, shape)):
        raise ValueError("no shape")
    frame = frame_of(record["dtype"], shape)
    if (record["bytes"], record["file_bytes"]) != (frame.payload_bytes, frame.size):
        raise ValueError("another size")
    return frame
