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

    A request without a name goes on in the one earlier request that ended where it begins; where several
    did, it counts as a request of its own.
    """
    ends: dict[str, int] = {}
    current: dict[str, str] = {}
    result: dict[int, list[Json] | None] = {}
    for number, batch in passes:
        spans = None if batch is None else _spans(batch)
        if batch is None or spans is None:
            result[number] = None
            continue
        if batch.names is None:
            names = _unnamed(number, spans, ends)
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


def _unnamed(number: int, spans: Sequence[tuple[int, int, int]], ends: Mapping[str, int]) -> list[str]:
    waiting: dict[int, list[str]] = {}
    for name, end in ends.items():
        waiting.setdefault(end, []).append(name)
    firsts = [first for _, _, first in spans]
    names = []
    for place, first in enumerate(firsts):
        before = waiting.get(first, []) if first else []
        alone = len(before) == 1 and firsts.count(first) == 1
        names.append(before[0] if alone else f"{number}.{place}")
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
