"""Whose rows a batch of a serving engine has, told from the positions and lengths that it was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tlcore.record import Json

from .files import DumpFiles, StoredAt, read_at

# A batch has no more tokens than that; a longer vector is no vector of positions.
_MOST_TOKENS = 1 << 20


class Batch(NamedTuple):
    """One forward pass: each token's position, each request's length after it, and its name if it has one.

    ``slots`` are names that a later request may have again.
    """

    positions: Sequence[int]
    lengths: Sequence[int]
    names: Sequence[str] | None = None
    slots: bool = False


def vector(files: DumpFiles, at: StoredAt) -> list[int] | None:
    """The values of a stored vector of integers; None for anything else. Raises ReadError."""
    if len(at.shape) != 1 or at.shape[0] > _MOST_TOKENS or at.dtype not in ("int32", "int64"):
        return None
    size = at.shape[0] * (4 if at.dtype == "int32" else 8)
    record: Mapping[str, Any] = {"place": at.place(), "shape": at.shape, "dtype": at.dtype, "bytes": size}
    found: list[int] = np.frombuffer(read_at(files, record), at.dtype).tolist()
    return found


def request_rows(passes: Iterable[tuple[int, Batch | None]]) -> dict[int, list[Json] | None]:
    """The rows of each pass, given in order; None where its vectors do not tell.

    Of what is a request without a name the next rows, `_Unnamed` tells.
    """
    ends: dict[str, int] = {}
    current: dict[str, str] = {}
    unnamed = _Unnamed()
    result: dict[int, list[Json] | None] = {}
    for number, batch in passes:
        spans = None if batch is None else _spans(batch)
        if batch is None or spans is None:
            result[number] = None
            unnamed.forget()
            continue
        if batch.names is None:
            names = unnamed.names(number, spans)
        elif batch.slots:
            names = _in_slots(number, batch.names, spans, ends, current)
        else:
            names = list(batch.names)
        ends.update({name: first + count for name, (_, count, first) in zip(names, spans, strict=True)})
        result[number] = [
            {
                "request_id": name,
                "external_request_id": name,
                "first_row": begin,
                "rows": count,
                "first_position": first,
            }
            for name, (begin, count, first) in zip(names, spans, strict=True)
        ]
    return result


def _spans(batch: Batch) -> list[tuple[int, int, int]] | None:
    """Each request's first row, how many it has, and its first position. What follows them is padding."""
    found, begin = [], 0
    for length in batch.lengths:
        if begin >= len(batch.positions):
            return None
        first = batch.positions[begin]
        end = begin + length - first
        if first < 0 or end <= begin or list(batch.positions[begin:end]) != list(range(first, length)):
            return None
        found.append((begin, end - begin, first))
        begin = end
    names = len(found) if batch.names is None else len(batch.names)
    unique = batch.names is None or len(set(batch.names)) == names
    return found if found and names == len(found) and unique else None


class _Unnamed:
    """Which request goes on where it has no name: the one that ended where the next begins, if that is sure.

    What begins behind a prefix from the cache looks as if it went on, too. So several rows are the next piece
    of a prompt of which the pass before had a piece; a single row is the next of a request that no pass of
    single rows has left out, as an engine decodes all that run at once. Else it is a request of its own.
    """

    def __init__(self) -> None:
        # Where each that may go on ended, and whether it was a piece of a prompt in the last pass.
        self._ends: dict[str, int] = {}
        self._pieces: set[str] = set()

    def forget(self) -> None:
        """There was a pass of which nothing is told."""
        self._ends.clear()
        self._pieces.clear()

    def names(self, number: int, spans: Sequence[tuple[int, int, int]]) -> list[str]:
        """The names of a pass's requests."""
        waiting: dict[int, list[str]] = {}
        for name, end in self._ends.items():
            waiting.setdefault(end, []).append(name)
        firsts = [first for _, _, first in spans]
        names = []
        for place, (_, count, first) in enumerate(spans):
            before = waiting.get(first, []) if first else []
            alone = len(before) == 1 and firsts.count(first) == 1
            goes_on = alone and (count == 1 or before[0] in self._pieces)
            names.append(before[0] if goes_on else f"{number}.{place}")
        if all(count == 1 and first for _, count, first in spans):
            self._ends.clear()
        told = list(zip(names, spans, strict=True))
        self._ends.update({name: first + count for name, (_, count, first) in told})
        self._pieces = {name for name, (_, count, _) in told if count > 1}
        return names


def _in_slots(
    number: int,
    slots: Sequence[str],
    spans: Sequence[tuple[int, int, int]],
    ends: Mapping[str, int],
    current: dict[str, str],
) -> list[str]:
    """A slot's request, until another one begins in it."""
    for slot, (_, _, first) in zip(slots, spans, strict=True):
        if slot not in current or ends[current[slot]] != first:
            current[slot] = f"{number}.{slot}"
    return [current[slot] for slot in slots]
