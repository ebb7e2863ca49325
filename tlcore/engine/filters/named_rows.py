"""What the user says of a batch's rows: the ``rows`` of `capture.step`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import CaptureError
from .batches import Flags, UnknownRowsError

_KEYS = {"request_id", "first", "rows", "first_position", "prompt"}


class Named(NamedTuple):
    """What the user says of one sequence of a batch: whose it is, and where in the batch its positions are.

    ``first`` and ``rows`` are a range along the axis of positions, None for what a mask says, or for all.
    ``prompt`` is how many of its positions are its prompt's.
    """

    request_id: str
    first: int | None = None
    rows: int | None = None
    first_position: int = 0
    prompt: int | None = None


def named_rows(rows: Any) -> list[Named | None]:
    """The ``rows`` of `capture.step`, checked. Raises CaptureError."""
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence):
        raise CaptureError(f"rows={rows!r} is no list with an entry for each sequence of the batch")
    found = [_named(each, place) for place, each in enumerate(rows)]
    ids = [each.request_id for each in found if each is not None]
    twice = [each for each, count in Counter(ids).items() if count > 1]
    if twice:
        raise CaptureError(f"rows names {twice[0]!r} twice; each sequence needs an id of its own")
    return found


def _named(entry: Any, place: int) -> Named | None:
    if entry is None:
        return None
    if isinstance(entry, str):
        return Named(entry)
    advice = 'give an id such as "a", {"request_id": "a", "first": 2, "rows": 5}, or None for padding'
    if not isinstance(entry, Mapping) or not isinstance(entry.get("request_id"), str):
        raise CaptureError(f"rows[{place}] is {entry!r}; {advice}")
    unknown = sorted(map(str, entry.keys() - _KEYS))
    if unknown:
        raise CaptureError(f"rows[{place}] has the unknown key {unknown[0]!r}; it may have {sorted(_KEYS)}")
    numbers = {key: entry[key] for key in _KEYS - {"request_id"} if entry.get(key) is not None}
    for key, value in numbers.items():
        if type(value) is not int or value < (key == "rows"):
            raise CaptureError(f"rows[{place}]: {key}={value!r} is not a number of positions")
    return Named(entry["request_id"], **numbers)


def with_ranges(flags: Flags, named: Sequence[Named | None], length: int) -> Flags:
    """Which positions are real, where ranges are given for those that a call computes: these, and no others.

    Raises UnknownRowsError for one that is longer than the batch.
    """
    flags = flags.copy()
    past = flags.shape[1] - length
    for sample, each in enumerate(named):
        if each is None:
            flags[sample] = False
        elif past == 0 and (each.first is not None or each.rows is not None):
            first = each.first or 0
            end = length if each.rows is None else first + each.rows
            if not first < end <= length:
                raise UnknownRowsError(
                    f"rows gives {each.request_id!r} positions {first} to {end} of {length}"
                )
            flags[sample] = False
            flags[sample, first:end] = True
    return flags


def other_batch(named: Sequence[Any], samples: int | None) -> str:
    """That a batch has not the sequences that were named."""
    has = "no tensor came" if samples is None else f"the batch has {samples}"
    return f"rows names {len(named)} sequences, and {has}"
