"""The steps of a segment as they are captured: what they have in common is found while they are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tlcore.layout.names import step_dir
from tlcore.layout.templates import structures_of
from tlcore.protocols import Buffer
from tlcore.record import Record, StepSummary

from .described import Describer, Slot

_MOST_KNOWN = 64
_HASH_BYTES = 16


class Plan:
    """Everything that steps which are alike have in common.

    ``originals`` has for each slot the position of the one whose bytes it shares, mostly its own;
    ``offsets`` where these begin among the ``nbytes`` of the step.
    """

    def __init__(
        self, slots: Sequence[Slot], originals: Sequence[int], calls: Sequence[str], structures: Sequence[str]
    ) -> None:
        self.slots = tuple(slots)
        # How many rows tensors have, each number once.
        self.extents = list(dict.fromkeys(slot.rows for slot in slots))
        self.originals = list(originals)
        self.calls = tuple(calls)
        self.structures = tuple(structures)
        offsets: list[int] = []
        self.nbytes = 0
        for position, (slot, original) in enumerate(zip(slots, originals, strict=True)):
            if original == position:
                offsets.append(self.nbytes)
                self.nbytes += slot.nbytes
            else:
                offsets.append(offsets[original])
        self.offsets = offsets


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


def hash_table(steps: Sequence[bytes], width: int) -> np.ndarray:
    """The hashes of steps of one plan as ``[steps, slots, 16]`` bytes."""
    return np.frombuffer(b"".join(steps), np.uint8).reshape(len(steps), width, _HASH_BYTES)
