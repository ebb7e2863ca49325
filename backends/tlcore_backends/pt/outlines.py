"""Steps without their records: what of a ``step.json`` is as in other steps is told by comparing texts."""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from tlcore.errors import ReadError
from tlcore.layout.checksums import without_checksum
from tlcore.layout.names import step_dir
from tlcore.layout.run_files import parse
from tlcore.protocols import Outline
from tlcore.record import Json

from ..storage.step_files import StepFiles
from .alike import divided

Numbers = np.ndarray[Any, np.dtype[np.int64]]
_STRING = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)
# What is a step's own beside integers. In a string a quotation mark has a backslash before it.
_OWN = re.compile(rb'"(?:checksum|started|ended|structures_hash)":"[^"\\]*"')
_INTEGER = re.compile(rb"(?<![0-9.eE+-])-?[0-9]+(?![0-9.eE+-])")
# The same in a document without blanks, with what stands before it; found much sooner, also in strings.
_SOON_FOUND = re.compile(rb"([:,\[]-?[0-9]+)(?=[,\]}])")
_DIGITS, _BEFORE = b"0123456789-", bytes.maketrans(b":,[", b"   ")
# Texts that are read at a time.
_MOST_BYTES = 8 << 20


class _Told(NamedTuple):
    """A step's text without its records, and what tells which others it is like."""

    alike: bytes
    kin: tuple[bytes, bytes]
    numbers: list[int]
    records: bytes
    rest: bytes


class Outlines:
    """Tells those of a run's steps; ``url`` is the run's."""

    def __init__(self, steps: StepFiles, url: str) -> None:
        self._steps, self._url = steps, url

    def of(self, step: int, rank: int) -> Outline:
        """A step's. Raises MissingError or ReadError."""
        text = self._steps.text(step, rank)
        self._steps.note(text, step, rank)
        where = f"{self._url}/{self._steps.name(step, rank)}"
        told = _told(text, step)
        if told is None:
            return _by_itself(without_checksum(parse(text, where)), step)
        # Once its text is known to be one, those of the same form need not be parsed.
        rest = _without_records(without_checksum(_part(told.rest, text, where)))
        return Outline(
            lambda: rest,
            told.alike,
            lambda: _part(told.records, text, where),
            told.kin,
            lambda: told.numbers,
            lambda: _places(told),
            lambda most: self._following(step, rank, told, len(text), most),
        )

    @cached_property
    def _listed(self) -> list[int]:
        # Whoever asks for those that follow goes through all steps.
        return list(self._steps)

    def _following(
        self, step: int, rank: int, told: _Told, size: int, most: int
    ) -> tuple[Sequence[int], Numbers]:
        """The steps behind one that are alike and kin, at most so many, and their numbers."""
        begin = bisect_right(self._listed, step)
        steps = self._listed[begin : begin + min(most, 1 + _MOST_BYTES // size)]
        found: list[list[int]] = []
        # What is wrong with one is told by who asks for it.
        with suppress(ReadError):
            for number, text in zip(steps, self._steps.texts(steps, rank), strict=True):
                if text is None:
                    break
                self._steps.note(text, number, rank)
                own = _told(text, number)
                if own is None or (own.alike, own.kin) != (told.alike, told.kin) or not _fits(own.numbers):
                    break
                found.append(own.numbers)
        return steps[: len(found)], np.array(found, np.int64).reshape(len(found), len(told.numbers))


def _told(text: bytes, step: int) -> _Told | None:
    """What tells a step's kind; None where its text is not as `PtSink` writes it."""
    parts = divided(text, f"{step_dir(step)}/".encode())
    if parts is None:
        return None
    begin, end, kind = parts
    rest = b"%s[]%s" % (text[:begin], text[end:])
    pieces = _SOON_FOUND.split(_OWN.sub(b"", rest))
    found = b"".join(pieces[1::2])
    try:
        numbers = list(map(int, found.translate(_BEFORE).split()))
    except ValueError:
        # Longer than any number.
        return None
    # No JSON text has this byte.
    kin = b"\0".join(pieces[::2]), found.translate(None, _DIGITS)
    return _Told(xxhash.xxh3_128_digest(kind), kin, numbers, text[begin:end], rest)


def _part(part: bytes, text: bytes, where: str) -> Any:
    """The value of a part of a document. Raises ReadError, which tells of the place in the whole."""
    try:
        return parse(part, where)
    except ReadError:
        parse(text, where)
        raise


def _fits(numbers: Sequence[int]) -> bool:
    return min(numbers, default=0) >= -(1 << 63) and max(numbers, default=0) < 1 << 63


def _places(told: _Told) -> Json:
    """A text's value with each integer's place among its numbers in its stead; nothing where they differ."""
    count = itertools.count()

    def place(match: re.Match[bytes]) -> bytes:
        return b"%d" % next(count)

    pieces = _STRING.split(told.rest)
    pieces[::2] = [_INTEGER.sub(place, each) for each in pieces[::2]]
    if next(count) != len(told.numbers):
        # Some are in strings, or have blanks around them; as in all that are kin.
        return {}
    return _without_records(without_checksum(json.loads(b"".join(pieces))))


def _without_records(document: Any) -> Json:
    if not isinstance(document, dict):
        # The reader says that it is none.
        return {}
    # A document without calls is none, which the reader says, too.
    return {"calls": None, **{key: value for key, value in document.items() if key != "records"}}


def _by_itself(document: Any, step: int) -> Outline:
    """The outline of a step whose numbers are not told apart."""
    records: Any = document.get("records") if isinstance(document, dict) else None
    text = json.dumps(records).replace(f'"{step_dir(step)}/', '"/')
    # The hashes are a step's own, and whoever is told that steps are alike need not know them.
    alike = xxhash.xxh3_128_digest(re.sub(r'"hash": "[^"\\]*"', "", text).encode())
    return Outline(lambda: _without_records(document), alike, lambda: records, *_alone(step))


def _alone(step: int) -> tuple[Any, ...]:
    """The rest of an outline of a step that is no other's kin."""
    nothing = np.empty((0, 0), np.int64)
    return step, list, dict, lambda most: ([], nothing)
