"""The contracts of what is told, or handed to a sink, without a record for each tensor.

Steps that are alike; and files that are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from .record import Json, Record, StepSummary

if TYPE_CHECKING:
    import numpy as np


class AlikeStep(NamedTuple):
    """A step of which the records and structures are those of ``like``, an earlier step of the same rank.

    Only the step's directory in their names, and the tensors' bytes and hashes are its own; and
    ``document``, which is all of it but the records and structures. ``hashes`` are of each record in order,
    16 bytes each. ``fill(memory)`` puts the bytes of all tensors that are no aliases, one after the other
    in the order of the records, ``nbytes`` in all, into memory of that size. It returns whether every tensor
    has the hash that its record states, the aliases too, and all that is stored with them is sound; what
    is wrong is told by reading the step as any other. Of a step that is captured ``document`` is empty.
    """

    step: int
    like: int
    document: Json
    hashes: bytes
    nbytes: int
    fill: Callable[[memoryview], bool]


@runtime_checkable
class SupportsAlikeSteps(Protocol):
    """A source that knows, without making their documents, which steps are alike."""

    def alike_steps(self, rank: int) -> Iterator[AlikeStep | int]:
        """Each step that a rank has committed, in order; the number alone of one that is like none.

        Called from one thread. Before the next is asked for, this one was read, or is left out. The
        reader checks ``document``, and each step that others are like as it checks any.
        """
        ...


@runtime_checkable
class SupportsWriteAlike(Protocol):
    """A sink that writes a whole step at once which is like one that it has written."""

    def write_alike(self, step: AlikeStep, summary: StepSummary) -> bool:
        """Write and commit a step between two others, as `Sink.write` and `Sink.commit_step` would.

        ``summary`` has its calls, and no structures. False, with nothing written, where it cannot be done:
        ``step.like`` is not known any more, or ``step.fill`` said no. The step then comes by `Sink.write`.
        """
        ...


@runtime_checkable
class SupportsAlikeInCapture(SupportsWriteAlike, Protocol):
    """A sink that says, once it is open, whether it does so in a capture too, whoever writes beside it."""

    alike_in_capture: bool


@runtime_checkable
class SupportsWriteResized(SupportsAlikeInCapture, Protocol):
    """A sink that does so for steps, too, that are like another but for how many rows tensors have."""

    def write_resized(self, step: AlikeStep, rows: bytes, summary: StepSummary) -> bool:
        """Write and commit a step as `write_alike` does, whose tensors have other first dimensions.

        ``rows`` has these of each record in order, as 64 bits; 1 for a tensor without dimensions.
        """
        ...


@runtime_checkable
class SupportsWriteWhole(Protocol):
    """A sink that is better off with all records of a step at once."""

    def write_whole(self, batches: Iterable[Sequence[Record]], summary: StepSummary) -> bool:
        """Write and commit a step between two others, as `Sink.write` and `Sink.commit_step` would.

        Records that are aliases come without bytes: their originals, of the same hash, dtype and shape, came
        before them. The bytes of a record stay as they are while somebody holds a view of them. False, with
        no batch asked for, where it cannot be done.
        """
        ...


# What moves tensors of a step, as `tlcore.checking.SupportsMoveSound` gives it.
Move = Callable[[Sequence[int], Sequence[int]], Callable[[int], bool]]


@runtime_checkable
class SupportsWriteMoved(Protocol):
    """A sink that tells where in its files tensors belong before anybody has read them."""

    def write_moved(self, batches: Iterable[tuple[Sequence[Record], Move]], summary: StepSummary) -> bool:
        """Write and commit a step between two others, as `Sink.write` and `Sink.commit_step` would.

        All records come without bytes, each batch with what writes these. False, with nothing written, where
        it cannot be done: a tensor is not sound, or ``batches`` raises ReadError.
        """
        ...


class Outline(NamedTuple):
    """A step's document without its records (``rest``), and what gives these.

    Calls and structures may be missing from it, too.

    ``alike`` is equal for steps whose records differ only in their names' step, in hashes and places.
    ``kin`` is equal for steps whose ``rest`` differs only in times, the step's number, and other integers:
    ``numbers`` has these, and ``places`` gives it with each one's place among them in its stead.
    ``following`` tells, of at most so many steps that follow and are alike and kin, which they are and their
    numbers ``[steps, numbers]``: of none where others were asked for meanwhile, of fewer where some do not
    fit into 64 bits.
    """

    rest: Callable[[], Json]
    alike: Hashable
    records: Callable[[], list[Json]]
    kin: Hashable
    numbers: Callable[[], list[int]]
    places: Callable[[], Json]
    following: Callable[[int], tuple[Sequence[int], np.ndarray[Any, np.dtype[np.int64]]]]


@runtime_checkable
class SupportsBegins(Protocol):
    """The rows of an array (`tlcore.protocols.Array`) that tell their first ones at less cost."""

    def begins(self) -> Mapping[int, int]:
        """The first row of each step that has some."""
        ...


class StructureKind(NamedTuple):
    """A structure without its tensors: of equal ``kind`` all are sound if one is.

    ``tensors`` are the logical names of these, which are stored tensors of the step, and ``make`` gives it.
    """

    kind: Hashable
    tensors: Sequence[str]
    make: Callable[[], Any]


class RecordKind(NamedTuple):
    """A record without its own names, hash and place: of equal ``kind`` all are sound if one is.

    ``name``, ``module`` and ``direction`` are its fields, and ``make`` gives all of it.
    """

    kind: Hashable
    name: str
    module: Any
    direction: Any
    make: Callable[[], Json]


class StepKinds(NamedTuple):
    """A step's document by its parts: records, structures by name, and the ``rest`` with its calls."""

    rest: Json
    records: Sequence[RecordKind]
    structures: Mapping[str, StructureKind]


@runtime_checkable
class SupportsStepKinds(Protocol):
    """A source that tells which parts of documents are alike at less cost than making them."""

    def step_kinds(self, step: int, rank: int) -> StepKinds | None:
        """What a step's document consists of; None where that cannot be told of all.

        Where a tensor's bytes lie, and how its hash is written, is as the source always has it. Raises
        MissingError or ReadError.
        """
        ...


@runtime_checkable
class SupportsOutlines(Protocol):
    """A source that tells steps' outlines at less cost than their documents."""

    def outline(self, step: int, rank: int) -> Outline:
        """What a rank has committed of a step. Raises MissingError or ReadError."""
        ...


@runtime_checkable
class SupportsAlikeTensors(Protocol):
    """A source that finds a tensor by its name: one record serves for all steps that are alike."""

    def record_in(self, record: Mapping[str, Any], step: int) -> Json:
        """The record of the same tensor in a step that is alike (`Outline`); its hash may be another's."""
        ...

    def read_rows(
        self,
        record: Mapping[str, Any],
        steps: Sequence[int],
        pieces: np.ndarray[Any, np.dtype[np.int64]],
        target: np.ndarray[Any, np.dtype[np.uint8]],
    ) -> bytes:
        """Put rows of the tensors that steps have in a record's stead to their places in ``target``.

        That is a matrix of bytes, each row of which takes a row of a tensor. ``pieces`` are ``[pieces, 4]``:
        the number of a step in ``steps``, which ascends, the first row in its tensor, the row of ``target``
        that this becomes, and how many there are. Returns a byte for each step: 1 where its rows were read;
        the others are read one by one, which tells what is wrong. Asked of a run on this machine alone.
        """
        ...


@runtime_checkable
class SupportsWholeFiles(Protocol):
    """A source whose files say nothing of where they lie, so that they may be taken to another place."""

    def whole_files(self, rank: int) -> Iterator[str]:
        """All that a rank has committed, by name: what commits something follows that of which it tells.

        Raises ReadError.
        """
        ...


@runtime_checkable
class SupportsTakenFiles(Protocol):
    """A sink in whose place another one's files may stand as they are."""

    def would_take(self, source: object) -> bool:
        """Whether a run's files may be taken, since those that this sink would make of them are no better."""
        ...
