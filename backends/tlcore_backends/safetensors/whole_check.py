"""Checking a segment by whole arrays: which of its steps are proven sound, without making their documents.

What is wrong is not told here: a step that is not proven is looked at by itself, by those who then say it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np

from tlcore.errors import ReadError
from tlcore.layout.hashes import HASH_BYTES
from tlcore.protocols import AlikeSteps, WholeCheck

from .array_places import LARGEST, Columns, Place
from .index import SegmentIndex
from .kinds import kinds_of
from .likeness import Likeness
from .segment_check import sound_head
from .stored_plans import Plan

# What steps of several kinds may have together: kinds times arrays, steps times arrays, and the steps of
# arrays that have not the same ones. An index of more is small to write and large to look at.
_MOST_OF_KINDS = 8_000_000
_MOST_LOOKED_AT = 1 << 33
_MOST_DISTINCT = 1 << 24
# What one thread reads and hashes at a time, at least where it is to be in memory.
_UNIT_BYTES = 16 << 20
_UNIT_RANGES = 1 << 16
# What is read meanwhile: of so many indexes, which are large in memory, and so many bytes.
_MOST_AHEAD, _AHEAD_BYTES = 10, 128 << 20
# Pieces that are kept for indexes to come.
_MOST_KEPT = 1 << 17

Numbers = np.ndarray
# Has ranges ``[n, 2]`` of a data file hashed, up to the first that cannot be read; the digests, or ReadError.
HashRanges = Callable[[str, Numbers], Future[bytes]]


class _Pieces(NamedTuple):
    """Ranges ``[n, 2]`` of a file; which of the index's hashes each should have, and whose it is: ``[n]``.

    An owner is a step's position in the index, or -1 - k for all steps of entry k of a list beside.
    """

    ranges: Numbers
    hashes: Numbers
    owners: Numbers


class _Part(NamedTuple):
    """Pieces of the file ``number`` of an index, which are read and hashed in one call."""

    number: int
    end: int
    pieces: _Pieces


class _Layout(NamedTuple):
    """All pieces of an index, and of those that lie as its own do."""

    parts: list[_Part]
    shared: list[Numbers]


class _Unit(NamedTuple):
    """Pieces on their way; ``head`` is the hash that what stands before them should have, or nothing."""

    pieces: _Pieces
    digests: Future[bytes]
    head: bytes


class UnderWay(NamedTuple):
    """A check that is under way, the bytes of its index, and those of its files."""

    check: WholeCheck
    text: int
    tensors: int

    @classmethod
    def of(cls, index: SegmentIndex, check: WholeCheck) -> UnderWay:
        """That of an index."""
        return cls(check, index.nbytes, sum(size for _, size in index.files))


def are_many(checks: Collection[UnderWay], most_text: int) -> bool:
    """Whether threads are busy with these while one is looked at, or their indexes have so many bytes."""
    texts, tensors = sum(each.text for each in checks), sum(each.tensors for each in checks)
    return len(checks) > _MOST_AHEAD or texts > most_text or tensors > _AHEAD_BYTES


def check_index(
    index: SegmentIndex,
    hash_ranges: HashRanges,
    problems: Callable[[Collection[int]], Iterable[str]],
    threads: int | None = None,
) -> WholeCheck:
    """The check of a segment, which is under way in other threads. Raises ReadError for a damaged index.

    ``problems`` says what is wrong with the segment's files, but for the heads of those with these numbers;
    then none of its steps is proven. A large file is shared among so many ``threads``; without, what comes of
    one range of it must fit into memory.
    """
    units: list[_Unit] = []
    parts, shared = _layout(index, threads)
    with_heads: set[int] = set()
    for number, end, pieces in parts:
        if number >= len(index.files):
            raise index.damaged(f"there is no file {number}")
        file, size = index.files[number]
        if end > size:
            raise index.damaged(f"an array ends behind the end of {file}")
        head = None if number in with_heads else sound_head(index, number)
        with_heads.update((number,) if head else ())
        ranges, hashed = pieces.ranges, b""
        if head is not None:
            ranges = np.concatenate((np.array([[0, head.size]], np.int64), ranges))
            hashed = bytes.fromhex(head.digest.partition(":")[2])
        units.append(_Unit(pieces, hash_ranges(file, ranges), hashed))
    # While the tensors are read in other threads. What is found out of the first helps with the next.
    groups = _alike(index)
    sound = not any(problems(with_heads))
    return WholeCheck(groups, lambda: _unsound(index, units, shared) if sound else index.steps)


def _layout(index: SegmentIndex, threads: int | None) -> _Layout:
    known: _Layout | None = index.common.layouts.get(index.layout)
    if known is None:
        shared: list[Numbers] = []
        parts = []
        for number, pieces in _by_file(index, shared).items():
            for each in _cut(pieces, threads):
                parts.append(_Part(number, int(each.ranges[:, 1].max(initial=0)), each))
        known = _Layout(parts, shared)
        if sum(len(part.pieces.owners) for part in parts) <= _MOST_KEPT:
            index.common.keep(index.common.layouts, index.layout, known)
    return known


def _unsound(index: SegmentIndex, units: Sequence[_Unit], shared: Sequence[Numbers]) -> Collection[int]:
    """The steps some of whose bytes have another hash, or cannot be read."""
    bad: set[int] = set()
    for unit in units:
        try:
            digests = unit.digests.result()
        except ReadError:
            digests = b""
        if not digests.startswith(unit.head):
            return index.steps
        digests = digests[len(unit.head) :]
        expected = index.places.hashes[unit.pieces.hashes]
        if digests == expected.tobytes():
            continue
        there = np.frombuffer(digests, np.uint8).reshape(-1, HASH_BYTES)
        sound = np.zeros(len(expected), bool)
        sound[: len(there)] = (there == expected[: len(there)]).all(axis=1)
        for owner in unit.pieces.owners[~sound].tolist():
            bad.update((owner,) if owner >= 0 else shared[-1 - owner].tolist())
    return {index.steps[position] for position in bad}


def _alike(index: SegmentIndex) -> list[AlikeSteps]:
    """The steps, together where their documents are alike but for numbers that any step may have."""
    found: dict[int, AlikeSteps] = {}
    pairs, ids = index.pairs()
    forms = list(index.forms())
    for kind, pair, step, form in zip(kinds_of(forms), ids, index.steps, forms, strict=True):
        if kind not in found:
            tensors, like = len(pairs[pair][0].arrays), Likeness(index, *form[:3])
            rest, rest_kind = partial(index.rest, step), index.rest_kind(form)
            found[kind] = AlikeSteps([], tensors, likeness=like, rest=rest, rest_kind=rest_kind)
        found[kind].steps.append(step)
    return list(found.values())


def _by_file(index: SegmentIndex, shared: list[Numbers]) -> dict[int, _Pieces]:
    """The pieces of each data file in the order in which they lie there."""
    pairs, ids = index.pairs()
    parts: dict[int, list[_Pieces]] = {}
    found = (
        _uniform(index, *pairs[0], len(ids), shared) if len(pairs) == 1 else _mixed(index, pairs, ids, shared)
    )
    for file, pieces in found:
        parts.setdefault(file, []).append(pieces)
    joined = {file: _joined(each) for file, each in parts.items()}
    return {file: _sorted(pieces) for file, pieces in joined.items()}


def _joined(parts: Sequence[_Pieces]) -> _Pieces:
    return _Pieces(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _sorted(pieces: _Pieces) -> _Pieces:
    order = np.argsort(pieces.ranges[:, 0], kind="stable")
    return _Pieces(pieces.ranges[order], pieces.hashes[order], pieces.owners[order])


def _cut(pieces: _Pieces, threads: int | None) -> Iterator[_Pieces]:
    ends = np.cumsum(pieces.ranges[:, 1] - pieces.ranges[:, 0])
    # After each part a thread may have to wait for the interpreter: a few large ones.
    unit = _UNIT_BYTES if threads is None else max(_UNIT_BYTES, -(-int(ends[-1]) // (2 * threads)))
    begin = 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        end = bisect_left(ends, before + unit, begin, min(len(ends), begin + _UNIT_RANGES))
        end = max(end, begin + 1)
        yield _Pieces(*(each[begin:end] for each in pieces))
        begin = end


def _uniform(
    index: SegmentIndex, plan: Plan, extents: Sequence[int], times: int, shared: list[Numbers]
) -> Iterator[tuple[int, _Pieces]]:
    """The pieces of steps that are all alike, file by file."""
    if plan.groups and max(plan.groups) >= len(extents):
        raise index.damaged(f"there is no extent {max(plan.groups)}")
    at = Columns(*(each[plan.arrays] for each in index.places.columns))
    rows, stored = np.array(extents, np.int64)[plan.groups], np.where(at.constant, 1, times)
    # Integers might not have room for these.
    ends = at.begin + rows.astype(float) * at.row_bytes * stored
    for wrong in np.flatnonzero((at.file < 0) | (ends > LARGEST) | (at.counts < stored)).tolist():
        number, count = plan.arrays[wrong], int(stored[wrong])
        place = index.places.of(number)
        _check(index, number, place, int(rows[wrong]) * place.row_bytes * count, count)
    columns = at.file, at.constant, at.begin, rows * at.row_bytes, at.first
    # Arrays that are the same have the same pieces.
    pieces = dict.fromkeys(zip(*(each.tolist() for each in columns), strict=True))
    table, everywhere = np.array(list(pieces), np.int64).reshape(-1, len(columns)), np.arange(times)
    for file, constant in sorted({piece[:2] for piece in pieces}):
        chosen = table[(table[:, 0] == file) & (table[:, 1] == constant)]
        begins, sizes, numbers = chosen[:, 2:].T[:, :, None]
        count = 1 if constant else times
        first = begins + sizes * np.arange(count)
        hashes = numbers + np.arange(count)
        if constant:
            shared.append(everywhere)
        owners = np.full(len(chosen), -len(shared)) if constant else np.tile(everywhere, len(chosen))
        yield file, _pieces(first.reshape(-1), (first + sizes).reshape(-1), hashes.reshape(-1), owners)


def _mixed(
    index: SegmentIndex,
    pairs: Sequence[tuple[Plan, Sequence[int]]],
    ids: Sequence[int],
    shared: list[Numbers],
) -> Iterator[tuple[int, _Pieces]]:
    """The pieces of steps of several kinds, array by array."""
    occurrences: dict[int, list[tuple[int, int]]] = {}
    if sum(len(plan.arrays) for plan, _ in pairs) > _MOST_OF_KINDS:
        raise _too_many(index)
    for pair, (plan, extents) in enumerate(pairs):
        for number, rows in _rows_of(index, plan, extents):
            occurrences.setdefault(number, []).append((pair, rows))
    if len(occurrences) * len(ids) > _MOST_LOOKED_AT:
        raise _too_many(index)
    every, known = np.asarray(ids, np.int64), set()
    distinct, places = _Distinct(index), dict[int, int]()
    for number, its in occurrences.items():
        table = np.full(len(pairs), -1, np.int64)
        for pair, rows in its:
            table[pair] = rows
        rows_of_steps = table[every]
        owners = positions = np.flatnonzero(rows_of_steps >= 0)
        counts = rows_of_steps[positions]
        place = index.places.of(number)
        if place.constant:
            if len(set(counts.tolist())) > 1:
                raise index.damaged(f"array {number} is constant and has different extents")
            counts = counts[:1]
        # What has no elements may have rows of any size.
        _check(index, number, place, max(sum(counts.tolist()), 1) * place.row_bytes, len(counts))
        steps = distinct.number(positions)
        first = int(index.places.columns.first[number])
        key = place.file, place.begin, first, distinct.number(counts), steps
        if key in known:
            continue
        known.add(key)
        if place.constant:
            if steps not in places:
                places[steps] = len(shared)
                shared.append(positions)
            owners = np.full(len(counts), -1 - places[steps])
        ends = place.begin + np.cumsum(counts * place.row_bytes)
        hashes = first + np.arange(len(counts))
        yield place.file, _pieces(ends - counts * place.row_bytes, ends, hashes, owners)


class _Distinct:
    """Gives lists of numbers a number each, equal ones the same. Mostly the same steps have every array."""

    def __init__(self, index: SegmentIndex) -> None:
        self._index = index
        self._known: dict[bytes, int] = {}
        self._size = 0

    def number(self, values: Numbers) -> int:
        """The number of a list. Raises ReadError for more than a segment of a capture has."""
        text = values.tobytes()
        found = self._known.get(text)
        if found is None:
            self._size += len(values)
            if self._size > _MOST_DISTINCT:
                raise _too_many(self._index)
            found = self._known[text] = len(self._known)
        return found


def _too_many(index: SegmentIndex) -> ReadError:
    return ReadError(f"{index.where}: too much to be looked at together")


def _rows_of(index: SegmentIndex, plan: Plan, extents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """How many rows each array of a step has."""
    for number, group in zip(plan.arrays, plan.groups, strict=True):
        if group >= len(extents):
            raise index.damaged(f"there is no extent {group}")
        yield number, extents[group]


def _check(index: SegmentIndex, number: int, place: Place, nbytes: int, hashes: int) -> None:
    if place.begin + nbytes > LARGEST:
        raise index.damaged(f"array {number} is larger than any file")
    if len(place.hashes) < HASH_BYTES * hashes:
        raise index.damaged(f"array {number} has too few hashes")


def _pieces(begins: Numbers, ends: Numbers, hashes: Numbers, owners: Numbers) -> _Pieces:
    return _Pieces(np.stack((begins, ends), axis=1), hashes, owners)
