"""What the records of steps that are alike have in common: each is a copy with its own name and place."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tlcore.layout.hashes import HASH_PREFIX
from tlcore.protocols import RecordKind
from tlcore.record import Json

from .array_places import PLACE_KEYS, Damaged, Place, Places
from .stored_plans import Plan, StoredPlans

# What stands in an entry, and is another in each that is alike.
_OWN = dict.fromkeys((*sorted(PLACE_KEYS), "name", "module"))
# Records that are kept; those of a step larger than this are made for that step.
_MOST_KEPT = 200_000


class RecordForm(NamedTuple):
    """One tensor of steps that are alike; ``content`` is the record, still without the step's own."""

    array: int
    tail: str
    content: Json
    shape: tuple[int, ...]
    rows: int
    nbytes: int
    place: Place
    shard: str | None


class RecordForms:
    """The forms of an index's records by plan and extents, the last ones kept."""

    def __init__(
        self,
        plans: StoredPlans,
        places: Places,
        table: Callable[[str, Any], Any],
        files: Callable[[], Sequence[tuple[str, int]]],
        damaged: Damaged,
    ) -> None:
        self._plans = plans
        self._places = places
        self._table = table
        self._files = files
        self._damaged = damaged
        self._known: dict[tuple[int, int], dict[int, RecordForm]] = {}
        self._kept = 0

    def of(self, plan_number: Any, extents_number: Any) -> dict[int, RecordForm]:
        """The forms by the number of their array, in order. Raises ReadError."""
        plan, extents = self._plans.of(plan_number), self._plans.extents(extents_number)
        known = self._known.get((plan_number, extents_number))
        if known is None:
            rows = self._rows(plan, extents)
            if self._kept + len(rows) > _MOST_KEPT:
                self._known, self._kept = {}, 0
            known = {array: self._form(array, count) for array, count in rows}
            self._known[plan_number, extents_number] = known
            self._kept += len(known)
        return known

    def kinds(self, plan_number: Any, extents_number: Any, directory: str) -> list[RecordKind]:
        """The records in order by their kinds; ``directory`` is their step's. Raises ReadError."""
        found = []
        plan, extents = self._plans.of(plan_number), self._plans.extents(extents_number)
        for array, rows in self._rows(plan, extents):
            self._places.of(array)
            entry = self._table("arrays", array)
            try:
                # Unlike equality, this tells 1 from 1.0 and from true; version 2 has no references.
                kind = marshal.dumps((rows, {**entry, **_OWN}), 2)
            except ValueError:
                raise self._damaged(f"array {array} is nested too deep") from None
            name, make = f"{directory}/{entry['name']}", partial(self._record, array, rows, directory)
            found.append(RecordKind(kind, name, entry.get("module"), entry.get("direction"), make))
        return found

    def _record(self, array: int, rows: int, directory: str) -> Json:
        """A record of the first step that has the array, as far as those of its kind are alike."""
        form = self._form(array, rows)
        digest, offsets = self._places.hash(array, 0), [form.place.begin, form.place.begin + form.nbytes]
        own = {"name": f"{directory}/{form.tail}", "hash": f"{HASH_PREFIX}{digest}"}
        return {**form.content, **own, "shard": form.shard, "offsets": offsets}

    def _rows(self, plan: Plan, extents: Sequence[int]) -> list[tuple[int, int]]:
        """The arrays of a step in order, and how many rows it has of each. Raises ReadError."""
        if plan.groups and max(plan.groups) >= len(extents):
            raise self._damaged(f"there is no extent {max(plan.groups)}")
        return [(array, extents[group]) for array, group in zip(plan.arrays, plan.groups, strict=True)]

    def _form(self, array: int, rows: int) -> RecordForm:
        place, entry, files = self._places.of(array), self._table("arrays", array), self._files()
        shape = () if place.scalar else (rows, *place.row)
        nbytes = rows * place.row_bytes
        content: Json = {key: value for key, value in entry.items() if key not in PLACE_KEYS}
        content |= {"name": "", "shape": list(shape)}
        if "bytes" in content:
            content["bytes"] = nbytes
        shard = files[place.file][0] if place.file < len(files) else None
        return RecordForm(array, entry["name"], content, shape, rows, nbytes, place, shard)
