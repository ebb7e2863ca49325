"""The structures of an index's steps: made when somebody looks at one, and compared without being made."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Collection, ItemsView, Iterator, Sequence, ValuesView
from functools import cached_property, partial
from typing import Any

from tlcore.layout.templates import compact
from tlcore.protocols import RecordKind, StructureKind
from tlcore.record import Json

from .array_places import Damaged
from .described import VALUE, restored
from .record_forms import RecordForm
from .stored_plans import Plan


class Structures(dict[str, Any]):
    """A step's structures by name: the names are there at once, the rest when any of them is looked at.

    Equal where what ``told`` returns is, and else where the structures are.
    """

    def __init__(
        self, names: Collection[str], make: Callable[[], Sequence[Any]], told: Callable[[], object]
    ) -> None:
        super().__init__(dict.fromkeys(names))
        self._make: Callable[[], Sequence[Any]] | None = make
        self._told = told

    def _made(self) -> None:
        make = self._make
        if make is not None:
            super().update(zip(super().keys(), make(), strict=True))
            self._make = None

    def __getitem__(self, name: str) -> Any:
        if name in self:
            self._made()
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        # Its own, since `dict(...)` would else copy what is not made yet.
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict):
            return False
        if isinstance(other, Structures):
            if self._told() == other._told():
                return True
            other._made()
        self._made()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get(self, name: str, default: Any = None) -> Any:
        """The structure of a name."""
        if name in self:
            self._made()
        return super().get(name, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # that of dict cannot be named
        """Names and structures."""
        self._made()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # as above
        """The structures."""
        self._made()
        return super().values()

    def copy(self) -> dict[str, Any]:
        """A plain dictionary of them."""
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __repr__(self) -> str:
        self._made()
        return super().__repr__()

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)


class StoredStructures:
    """The structures of an index; ``table`` gives an entry of one of its tables. All may raise ReadError."""

    def __init__(self, table: Callable[[str, Any], Any], damaged: Damaged) -> None:
        self._table = table
        self._damaged = damaged
        self._plans: dict[int, tuple[list[tuple[str, Any]], list[str]]] = {}
        self._stems: dict[bytes, Sequence[str] | None] = {}
        # By plan and extents.
        self._texts: dict[tuple[int, int], bytes] = {}

    def of(
        self,
        pair: tuple[int, int],
        plan: Plan,
        forms: dict[int, RecordForm],
        values: Any,
        where: tuple[str, int],
        records: Sequence[Json],
    ) -> Structures:
        """Those of a step with these records, in ``where``: its directory and the rank."""
        entries, ranked = self._entries(pair[0], plan, where[1])
        names = dict.fromkeys(ranked)

        def make() -> Sequence[Any]:
            by_name = {record["name"]: record for record in records}
            given = iter(values if isinstance(values, list) else ())
            made = dict(names)
            # In the order in which the values are told.
            for key, (name, node) in zip(ranked, entries, strict=True):
                made[key] = self._restored(node, name, where[0], by_name, given)
            return list(made.values())

        return Structures(names, make, lambda: (where, self._text(pair, plan, forms), values))

    def kinds(
        self, number: int, plan: Plan, where: tuple[str, int], records: Sequence[RecordKind]
    ) -> dict[str, StructureKind] | None:
        """The kinds of those of a step with these records, as `StepKinds` has them."""
        entries, ranked = self._entries(number, plan, where[1])
        by_name = _Made(records)

        def make(node: Any, name: str) -> Any:
            return self._restored(node, name, where[0], by_name, iter(()))

        found: dict[str, StructureKind] = {}
        for key, (name, node) in zip(ranked, entries, strict=True):
            told = self._told_of(node)
            if told is None:
                return None
            kind, stems = told
            begin = f"{where[0]}/{name.rpartition('/')[0]}/"
            found[key] = StructureKind(kind, [begin + stem for stem in stems], partial(make, node, name))
        return found

    def _told_of(self, node: Any) -> tuple[bytes, Sequence[str]] | None:
        """A node as it stands in the index, and its tensors; None where it has more than their names."""
        try:
            # Unlike equality, this tells 1 from 1.0 and from true; version 2 has no references.
            text = marshal.dumps(node, 2)
        except ValueError:
            return None
        if text not in self._stems:
            self._stems[text] = _plain_stems(node)
        stems = self._stems[text]
        return None if stems is None else (text, stems)

    def _entries(self, number: int, plan: Plan, rank: int) -> tuple[list[tuple[str, Any]], list[str]]:
        """A plan's structures as they stand in the index, and the names that a rank's have."""
        known = self._plans.get(number)
        if known is None:
            suffix = "" if rank == 0 else f"_rank_{rank}"
            entries = [self._entry(each) for each in plan.structures]
            ranked = [f"{name.removesuffix('.json')}{suffix}.json" for name, _ in entries]
            known = self._plans[number] = entries, ranked
        return known

    def _entry(self, number: int) -> tuple[str, Any]:
        entry = self._table("structures", number)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise self._damaged(f"structure {number} has no name")
        return entry[0], entry[1]

    def _restored(self, node: Any, name: str, directory: str, by_name: Any, given: Any) -> Any:
        try:
            return restored(node, name, directory, by_name, given)
        except (KeyError, StopIteration, RuntimeError, RecursionError):
            raise self._damaged(f"structure {name!r} refers to what is not there") from None

    def _text(self, pair: tuple[int, int], plan: Plan, forms: dict[int, RecordForm]) -> bytes:
        """What stands for all that structures of steps alike are made of, but for the values.

        A digest, since a run may have as many of them as its steps have numbers of tokens.
        """
        known = self._texts.get(pair)
        if known is None:
            entries = [self._table("structures", number) for number in plan.structures]
            used = [
                [form.tail, form.shape, form.content.get("dtype"), form.content.get("device")]
                for form in forms.values()
            ]
            text = compact([entries, used]).encode()
            known = self._texts[pair] = hashlib.blake2b(text, digest_size=20).digest()
        return known


class _Made:
    """Records by name, made when they are asked for."""

    def __init__(self, records: Sequence[RecordKind]) -> None:
        self._records = records

    @cached_property
    def _by_name(self) -> dict[str, RecordKind]:
        return {each.name: each for each in self._records}

    def __getitem__(self, name: str) -> Json:
        return self._by_name[name].make()


def _plain_stems(node: Any) -> Sequence[str] | None:
    """The tensors of a node that is told by their names alone, and leaves no value open; else None."""
    found: list[str] = []
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            stem = each.get("tensor")
            if each == VALUE or each.get("type") == "tensor" or (stem is not None and len(each) > 1):
                return None
            if isinstance(stem, str):
                found.append(stem)
            else:
                waiting += each.values()
    return found
