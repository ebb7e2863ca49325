"""What all sources of foreign dumps have in common: documents made of what a tool's files tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json
from tlcore.storage import Store

from .documents import Found, step_document
from .files import DumpFiles, read_at

ONE_RANK = StepRanks(frozenset((0,)))


class ForeignSource(ABC):
    """A `tlcore.protocols.Source` of another tool's dump; ``tool`` names the format.

    A subclass tells by `recognise` whether a place holds one, and gives `steps` and `found`.
    """

    tool: ClassVar[str]

    def __init__(self, store: Store, run: Json) -> None:
        self.files = DumpFiles(store)
        self.run = run

    @classmethod
    @abstractmethod
    def recognise(cls, files: DumpFiles) -> Json | str | None:
        """The keys of ``run.json`` for a dump of this tool, at least ``world_size``; None for anything else.

        A text says what is missing where something looks like one and is none.
        """

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

    def document(self, step: int, rank: int) -> Json:
        """The step as a capture would have told it."""
        return step_document(step, rank, self.found(step, rank), self.rows(step, rank))

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of a tensor, from the tool's file."""
        if (begin or end is not None) and "strides" not in record["place"] and "at" in record["place"]:
            stop = record["bytes"] if end is None else end
            place = {**record["place"], "at": record["place"]["at"] + begin}
            return read_at(self.files, {**record, "place": place, "bytes": max(0, stop - begin)})
        data = self.whole(record)
        return data if begin == 0 and end is None else memoryview(data)[begin:end]

    def whole(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor."""
        return read_at(self.files, record)

    def own_bytes(self, record: Mapping[str, Any]) -> Buffer:
        """All bytes of a tensor; what can be written was made for this."""
        return self.whole(record)

    def remains(self, step: int) -> Mapping[str, Json]:
        """Nothing: a dump has no steps that were not committed."""
        return {}

    def close(self) -> None:  # noqa: B027  # what most need
        """Nothing is held open."""
