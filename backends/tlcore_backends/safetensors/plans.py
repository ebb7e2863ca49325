"""The steps of a segment as they are captured: what they have in common is found while they are written."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tlcore.layout.names import step_dir
from tlcore.layout.templates import structures_of
from tlcore.protocols import Buffer, Lease
from tlcore.record import Record, StepSummary

from .compact import Table, repeats
from .described import Describer, Slot

_MOST_KNOWN = 64
# Plans that differ from one in rows alone, as many as may be of a small model.
_MOST_RESIZED = 64


class Common(NamedTuple):
    """What an index says of a plan that is its first: the numbers of its arrays, its text but for rows.

    ``tables`` are those of arrays, calls and structures then.
    """

    arrays: list[int]
    text: str
    tables: tuple[Table, Table, Table]


class Plan:
    """Everything that steps which are alike have in common.

    ``originals`` has for each slot the position of the one whose bytes it shares, mostly its own. ``table``
    is ``[3, slots]``: where these begin among the ``nbytes`` of the step, the tensor's bytes and its rows.
    ``base`` is the plan from which this one differs in these alone, or itself.
    """

    def __init__(
        self, slots: Sequence[Slot], originals: Sequence[int], calls: Sequence[str], structures: Sequence[str]
    ) -> None:
        self.slots = tuple(slots)
        self.originals = list(originals)
        self.calls = tuple(calls)
        self.structures = tuple(structures)
        self.base = self
        # The same for each index.
        self.common: Common | None = None
        self._resized: OrderedDict[bytes, Plan] = OrderedDict()
        self._take_rows(np.array([slot.rows for slot in slots], np.int64))

    def _take_rows(self, rows: np.ndarray) -> None:
        base = self.base
        sizes = rows * base._row_bytes
        own = base._own
        begins = np.cumsum(np.where(own, sizes, 0))
        self.nbytes = int(begins[-1]) if len(begins) else 0
        self.table = np.stack([(begins - sizes)[base._places], sizes, rows])
        # How many rows tensors have, each number once.
        self.extents = list(dict.fromkeys(rows.tolist()))

    @property
    def offsets(self) -> list[int]:
        """Where each slot's bytes begin among those of the step."""
        offsets: list[int] = self.table[0].tolist()
        return offsets

    @cached_property
    def _row_bytes(self) -> np.ndarray:
        widths = [math.prod(slot.row) * slot.dtype.itemsize for slot in self.slots]
        return np.array(widths, np.int64)

    @cached_property
    def _places(self) -> np.ndarray:
        return np.array(self.originals, np.int64)

    @cached_property
    def _own(self) -> np.ndarray:
        own: np.ndarray = self._places == np.arange(len(self._places))
        return own

    @cached_property
    def groups(self) -> list[int]:
        """For each slot the place of its rows among the ``extents``, as `repeats`."""
        places = {rows: place for place, rows in enumerate(self.extents)}
        return repeats(map(places.__getitem__, self.table[2].tolist()))

    def resized(self, rows: bytes) -> Plan:
        """The plan of steps like these but for the ``rows`` of each slot, 64 bits each."""
        base = self.base
        known = base._resized.get(rows)
        if known is None:
            known = copy.copy(base)
            vars(known).pop("groups", None)
            known._take_rows(np.frombuffer(rows, np.int64))
            if len(base._resized) >= _MOST_RESIZED:
                base._resized.popitem(last=False)
            base._resized[rows] = known
        base._resized.move_to_end(rows)
        return known


class OpenStep:
    """A step whose records come in: their slots, hashes and aliases."""

    def __init__(self, number: int, expected: Plan | None, begin: int) -> None:
        self.number = number
        self.begin = begin
        self.slots: list[Slot] = []
        self.originals: list[int] = []
        self.digests: list[str] = []
        self._expected = expected.slots if expected is not None else ()
        self.is_expected = True
        self._skipped = len(step_dir(number)) + 1
        self._positions: dict[str, int] = {}
        # Of a step whose memory is kept: the bytes of each slot that is no alias, by its position.
        self.kept: dict[int, np.ndarray] | None = None
        self.leases: list[Lease] = []

    @property
    def kept_bytes(self) -> int:
        """How many bytes lie in memory that is kept."""
        return sum(each.nbytes for each in (self.kept or {}).values())

    def keep(self, first: int, parts: Sequence[Buffer], lease: Lease | None) -> None:
        """Keep ``parts``, the bytes of slots from ``first`` on; without a ``lease`` copies of them."""
        own = [place for place in range(first, len(self.slots)) if self.originals[place] == place]
        self.kept = {} if self.kept is None else self.kept
        for place, part in zip(own, parts, strict=True):
            data = memoryview(part).cast("B") if lease is not None else bytes(part)
            self.kept[place] = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
        if lease is not None:
            self.leases.append(lease)

    def give_back(self) -> None:
        """Forget what is kept."""
        leases, self.leases, self.kept = self.leases, [], None
        for lease in leases:
            lease.end()

    def add(self, batch: Sequence[Record], describer: Describer) -> list[Buffer]:
        """Note records; returns the bytes of those that are no aliases."""
        slots, originals, digests, positions = self.slots, self.originals, self.digests, self._positions
        expected, most, skipped = self._expected, len(self._expected), self._skipped
        data: list[Buffer] = []
        position = len(slots)
        for record in batch:
            name = record.name
            slot = expected[position] if position < most else None
            if (
                slot is None
                or slot.origin is not record.origin
                or len(name) != skipped + len(slot.tail)
                or not name.endswith(slot.tail)
            ):
                slot = describer.slot(record)
                self.is_expected = False
            original = position if record.alias_of is None else positions.get(record.alias_of, position)
            # An alias whose original was not stored, or has another size, stands for itself.
            if original != position and slots[original].nbytes != slot.nbytes:
                original = position
            if original == position:
                data.append(record.data)
            slots.append(slot)
            originals.append(original)
            digests.append(record.hash)
            positions[name] = position
            position += 1
        return data

    @property
    def hashes(self) -> bytes:
        """The records' hashes, 16 bytes each."""
        return bytes.fromhex("".join(self.digests))


class Plans:
    """Finds the plan of a step among those of the last steps, or makes it."""

    def __init__(self) -> None:
        self.describer = Describer()
        self.last: Plan | None = None
        self._known: dict[object, Plan] = {}
        # Keeps the objects alive that a key knows by their identity.
        self._kept: list[object] = []

    def plan(self, step: OpenStep, summary: StepSummary) -> Plan:
        """The plan of a step that has ended."""
        directory = step_dir(summary.step)
        structures = structures_of(directory, summary.structures)
        templates = structures.templates
        key = (
            tuple(map(id, step.slots)),
            tuple(step.originals),
            tuple(map(id, templates)),
            tuple(summary.calls),
        )
        plan = self._known.get(key)
        if plan is None:
            origins = {slot.tail: slot.origin for slot in step.slots}
            texts = tuple(
                self.describer.structure(structures, name, directory, origins) for name in structures
            )
            same = (key[0], key[1], texts, key[3])
            plan = self._known.get(same)
            if plan is None:
                plan = Plan(step.slots, step.originals, summary.calls, texts)
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
                self._kept.clear()
            self._known[key] = self._known[same] = plan
            self._kept.append((templates, plan))
        self.last = plan
        return plan
