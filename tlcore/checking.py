"""The contracts of checking a run: what is wrong with a step beside its tensors, and many steps at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .record import Json
from .storage import Buffer


@runtime_checkable
class SupportsCheck(Protocol):
    """A source whose format has more to be wrong than tensors' hashes (sizes, headers, overlaps)."""

    def problems(self, step: int, rank: int, document: Json, thorough: bool = True) -> Iterator[str]:
        """A line for each thing that is wrong with what a rank stored of a step.

        Without ``thorough`` only what can be seen in the document itself, and in others whose hash it has.
        """
        ...


@runtime_checkable
class SupportsUnchecked(Protocol):
    """A source whose documents have checksums, but for those that earlier versions wrote."""

    @property
    def unchecked(self) -> Collection[str]:
        """The names of the documents read so far that have none."""
        ...


@runtime_checkable
class SupportsReadSound(Protocol):
    """A source that proves tensors sound while it reads them from this machine."""

    def sound_read(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Callable[[], Sequence[Buffer] | None] | None:
        """What reads records of a step, in any thread, and then hardly needs the interpreter.

        It gives their bytes in order; none of such as are aliases. All have the hashes that their records
        state, the aliases too, and what is stored with them is sound. None where that cannot be said of each:
        `read_many` then tells why, and of damage nothing is asked any more. ``known``, the same for each
        call, is for the source to remember what of the step it is about to read.
        """
        ...


@runtime_checkable
class SupportsMoveSound(Protocol):
    """A source that proves tensors sound while it writes them from this machine into a file of it."""

    def sound_move(
        self, records: Sequence[Mapping[str, Any]], known: dict[Hashable, str]
    ) -> Callable[[Sequence[int], Sequence[int]], Callable[[int], bool]] | None:
        """What moves records of a step; None where they are none of which `SupportsReadSound` can tell.

        It takes the numbers of some of them and their places in a file, -1 for such as only need proof, and
        gives what, in any thread, writes them there with the handle of that file, and returns whether all are
        sound. If not, anything may stand in the file. Dtype, shape, sizes and hash of each are what a record
        may have. ``known`` is as ever.
        """
        ...


class AlikeSteps(NamedTuple):
    """Steps of a rank, of so many ``tensors`` each, whose documents are sound if that of the first is.

    ``rests``, where there are some, are what of each step's document may be anything: a document without
    records, which the reader checks. Steps of several checks of a rank have the same ``likeness`` where it is
    enough to look at one of them, and at each group's ``rest``: it gives the first document without calls,
    records and structures. Of groups of the same ``rest_kind`` one is enough. Who gives these proves no step
    of which `problems` would say anything.
    """

    steps: list[int]
    tensors: int
    rests: Sequence[Json] = ()
    likeness: Hashable | None = None
    rest: Callable[[], Json] | None = None
    rest_kind: Hashable | None = None


class WholeCheck(NamedTuple):
    """A check that is under way. ``unsound()`` waits, and gives the steps of which a tensor is not sound."""

    alike: Sequence[AlikeSteps]
    unsound: Callable[[], Collection[int]]


@runtime_checkable
class SupportsWholeChecks(Protocol):
    """A source that checks the tensors of many steps in few large reads."""

    def whole_checks(self, rank: int) -> Iterator[WholeCheck]:
        """Checks of a rank's steps, in order. What none of them proves is then read step by step."""
        ...
