"""Steps of segments that are like an earlier one: where the bytes of each lie, without a record for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tlcore.alike import AlikeStep
from tlcore.errors import ReadError
from tlcore.layout.hashes import HASH_BYTES
from tlcore.layout.templates import compact

from .array_places import LARGEST
from .index import SegmentIndex

# Reads ranges ``[n, 3]`` (begin, end, place in memory or -1) of a file; gives their hashes.
Gather = Callable[[str, np.ndarray, memoryview], bytes]
_FORM_BYTES = 4
_MOST_KINDS = 64
# Tensors in all that is kept of steps with the same plan and extents, of which an index may have very many.
_MOST_KEPT = 1 << 19
_NOWHERE = -1
Array = np.ndarray


class AlikeSteps:
    """Finds steps that are alike, segment after segment; ``gather`` reads their bytes."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        # The first step of each kind, by what all of them have in common.
        self._first: dict[bytes, int] = {}

    def of(self, index: SegmentIndex) -> Iterator[AlikeStep | int]:
        """Each step of an index, in order."""
        try:
            table = _Table(index)
        except (ReadError, OverflowError):
            yield from index.steps
            return
        for position, step in enumerate(index.steps):
            try:
                found = self._look(index, table, position)
            except (ReadError, OverflowError, RecursionError):
                # Where those behind it lie is not known either. Who reads it by itself says what is wrong.
                yield from index.steps[position:]
                return
            yield found or step

    def _look(self, index: SegmentIndex, table: _Table, position: int) -> AlikeStep | None:
        step = index.steps[position]
        pair = table.pair(position)
        at = table.take(pair)
        key = hashlib.blake2b(pair.key + at.originals.tobytes(), digest_size=20).digest()
        first = self._first.setdefault(key, step)
        if len(self._first) > _MOST_KINDS:
            self._first.clear()
        if first == step:
            return None
        document = index.rest(step)
        document["calls"] = index.calls_of(index.pair(position)[0])
        own = at.originals == np.arange(len(at.originals))
        sizes = np.where(own, at.ends - at.begins, 0)
        places = np.where(own, np.cumsum(sizes) - sizes, _NOWHERE)
        nbytes = int(sizes.sum())
        # Where an alias is the very same bytes, they need not be looked at twice.
        original = at.originals
        again = own | (at.begins != at.begins[original]) | (at.files != at.files[original])

        def fill(memory: memoryview) -> bool:
            return self._fill(at, places, again, memory)

        return AlikeStep(step, first, document, at.hashes.tobytes(), nbytes, fill)

    def _fill(self, at: _At, places: Array, wanted: Array, memory: memoryview) -> bool:
        try:
            for number in np.unique(at.files[wanted]).tolist():
                chosen = wanted & (at.files == number)
                ranges = np.stack([at.begins[chosen], at.ends[chosen], places[chosen]], axis=1)
                if self._gather(at.names[number], ranges, memory) != at.hashes[chosen].tobytes():
                    return False
        except (ReadError, ValueError, OSError, MemoryError):
            return False
        return True


class _Pair(NamedTuple):
    """Steps of one plan and extents: their arrays, and the rows and bytes that each step adds to them."""

    key: bytes
    arrays: Array
    rows: Array
    sizes: Array
    forms: Array


class _At(NamedTuple):
    """Where the tensors of a step lie: in which of the files ``names``, and the hash of each."""

    begins: Array
    ends: Array
    files: Array
    names: list[str]
    hashes: Array
    originals: Array


class _Table:
    """The places and hashes of an index's arrays in columns, and how far its steps have come in them."""

    def __init__(self, index: SegmentIndex) -> None:
        self._index = index
        # None of it says where anything lies, so it holds of all indexes that have this in common.
        self._pairs: dict[tuple[int, int, str], _Pair] = index.common.pairs
        self._names = [name for name, _ in index.files]
        places = index.places
        for number in np.flatnonzero(places.columns.file < 0).tolist():
            places.of(number)
        self._at, self._hashes = places.columns, places.hashes
        count = len(index.entries("arrays"))
        self._times = np.zeros(count, np.int64)
        self._rows = np.zeros(count, np.int64)

    def pair(self, position: int) -> _Pair:
        """What a step shares with those that are alike. Raises ReadError."""
        plan, extents, values = self._index.pair(position)
        key = plan, extents, compact(values)
        known = self._pairs.get(key)
        if known is None:
            known = self._made(position, plan, values)
            if sum(len(pair.arrays) for pair in self._pairs.values()) > _MOST_KEPT:
                self._pairs.clear()
            self._pairs[key] = known
        return known

    def _made(self, position: int, plan: Any, values: Any) -> _Pair:
        forms = list(self._index.forms_at(position).values())
        content = [
            self._index.calls_of(plan),
            [self._index.table("structures", number) for number in self._index.plan(plan).structures],
            values,
            [[form.tail, form.content, form.nbytes] for form in forms],
        ]
        text = hashlib.blake2b(compact(content).encode(), digest_size=20).digest()
        arrays = np.array([form.array for form in forms], np.int64)
        rows = np.array([form.rows for form in forms], np.int64)
        known: dict[tuple[str, tuple[int, ...]], int] = {}
        kinds = [known.setdefault((str(form.content.get("dtype")), form.shape), len(known)) for form in forms]
        sizes = np.array([form.nbytes for form in forms], np.int64)
        return _Pair(text, arrays, rows, sizes, np.array(kinds, np.int32))

    def take(self, pair: _Pair) -> _At:
        """Where the next step of these lies. Raises ReadError where what an index says of it cannot be."""
        arrays = pair.arrays
        constant = self._at.constant[arrays]
        times = np.where(constant, 0, self._times[arrays])
        begins = self._at.begin[arrays] + np.where(
            constant, 0, self._rows[arrays] * self._at.row_bytes[arrays]
        )
        self._times[arrays] += 1
        self._rows[arrays] += pair.rows
        ends, files = begins + pair.sizes, self._at.file[arrays]
        sound = (times < self._at.counts[arrays]).all() and (files < len(self._names)).all()
        if not sound or (begins < 0).any() or (ends < begins).any() or (ends > LARGEST).any():
            raise self._index.damaged("a step's tensors lie where nothing can")
        hashes = self._hashes[self._at.first[arrays] + times]
        return _At(begins, ends, files, self._names, hashes, _originals(hashes, pair.forms))


def _originals(hashes: Array, forms: Array) -> Array:
    """For each tensor the first with the same hash, dtype and shape."""
    told = np.concatenate([hashes, forms.view(np.uint8).reshape(-1, _FORM_BYTES)], axis=1).tobytes()
    width = HASH_BYTES + _FORM_BYTES
    known: dict[bytes, int] = {}
    keys = (told[at : at + width] for at in range(0, len(told), width))
    return np.array([known.setdefault(key, place) for place, key in enumerate(keys)], np.int64)
