"""What all sources of foreign dumps have in common: documents made of what a tool's files tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from tlcore.errors import MissingError, ReadError
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json
from tlcore.storage import Store

from .documents import Found, Structures, sharding_of, step_document
from .files import DumpFiles, read_at

_MOST_KEPT = 16
ONE_RANK = StepRanks(frozenset((0,)))


class ForeignSource(ABC):
    """A `tlcore.protocols.Source` of another tool's dump; ``tool`` names the format.

    A subclass tells by `recognise` whether a place holds one, and gives `steps` and `found`.
    """

    tool: ClassVar[str]

    def __init__(self, store: Store, run: Json) -> None:
        self.files = DumpFiles.of(store)
        self.run = run
        self._structures: dict[tuple[int, int], Structures] = {}

    @classmethod
    @abstractmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """The keys of ``run.json`` for a dump of this tool, at least ``world_size``; None for anything else.

        A text says what is missing where something looks like one and is none.
        """

    @classmethod
    def passed_over(cls, files: DumpFiles) -> list[str]:
        """Files in a dump that is known which look like its own and are not read, by their names."""
        return []

    @property
    @abstractmethod
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps of the dump and the ranks that have them."""

    @abstractmethod
    def found(self, step: int, rank: int) -> Sequence[Found]:
        """The tensors of a step and rank, in the order in which they came about. Raises ReadError."""

    def rows(self, step: int, rank: int) -> Sequence[Json] | None:
        """Whose the rows of the step's tensors are, as in ``step.json``; None where nothing tells."""
        return None

    def rows_with(self, step: int, rank: int, found: Sequence[Found]) -> Sequence[Json] | None:
        """The same, where the tensors were just looked up."""
        return self.rows(step, rank)

    def document(self, step: int, rank: int) -> Json:
        """The step as a capture would have told it."""
        found = self.found(step, rank)
        document, structures = step_document(step, rank, found, self.rows_with(step, rank, found))
        self._keep(step, rank, structures)
        place = next((each for each in self.run.get("ranks", ()) if each["rank"] == rank), None)
        sharding = None if place is None else sharding_of(found, place)
        return document if sharding is None else {**document, "sharding": sharding}

    def _keep(self, step: int, rank: int, structures: Structures) -> None:
        if len(self._structures) >= _MOST_KEPT:
            self._structures.clear()
        self._structures[step, rank] = structures

    def _structures_of(self, step: int, rank: int) -> Structures:
        """Those of a step and rank, which are mostly asked for after its document."""
        found = self._structures.get((step, rank))
        if found is None:
            found = step_document(step, rank, self.found(step, rank))[1]
            self._keep(step, rank, found)
        return found

    def structure_names(self, step: int, rank: int) -> Collection[str]:
        """``<call>/<direction>.json`` for each structure document."""
        return self._structures_of(step, rank).names

    def structure(self, step: int, rank: int, name: str) -> Any:
        """One of these documents. Raises MissingError, or ReadError as `found` does."""
        found = self._structures_of(step, rank).get(name)
        if found is None:
            raise MissingError(f"{self.files.url}: step {step} of rank {rank} has no {name}")
        return found

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of a tensor, from the tool's file."""
        found = self.located(record)
        place = found["place"]
        if (begin or end is not None) and "strides" not in place and "at" in place:
            stop = found["bytes"] if end is None else end
            part = {**found, "place": {**place, "at": place["at"] + begin}, "bytes": max(0, stop - begin)}
            return read_at(self.files, part)
        data = self.whole(found)
        return data if begin == 0 and end is None else memoryview(data)[begin:end]

    def located(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the place of its bytes, where a file is looked at only when it is read.

        Raises ReadError where the file holds another tensor.
        """
        return record

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor whose record is `located`."""
        return read_at(self.files, record)

    def own_bytes(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor; what can be written was made for this."""
        return self.whole(self.located(record))

    def remains(self, step: int) -> Mapping[str, Json]:
        """Nothing: a dump has no steps that were not committed."""
        return {}

    def close(self) -> None:
        """Close the file that was read last."""
        self.files.close()


def as_told(record: Mapping[str, Any], found: Found, where: str, said: str) -> Mapping[str, Any]:
    """A record with the place that was found. Raises ReadError where what is there is not as was told."""
    if (found.dtype, list(found.shape)) != (record["dtype"], list(record["shape"])):
        held, told = f"{found.dtype} {list(found.shape)}", f"{record['dtype']} {list(record['shape'])}"
        raise ReadError(f"{where}: holds {held}, {said} {told}")
    return {**record, "place": found.place}
