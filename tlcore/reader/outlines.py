"""Steps without their records, for who looks at all of a run's steps and finds most of them alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..layout.names import rank_suffix, step_dir
from ..protocols import Outline, SupportsOutlines
from ..record import Json
from .documents import check_records, check_step
from .step import Step
from .stored import Stored

if TYPE_CHECKING:
    from .run import Run

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class OutlinedStep(Step):
    """A whole step that has no records: what rows and tokens it has is told, as of any step.

    ``whole`` is the step with its records. ``alike`` is equal for steps whose records differ only in their
    names' step, in hashes and places.
    """

    @cached_property
    def _outlines(self) -> Mapping[int, Outline]:
        # Asked once for all steps (`has_outlines`): it takes as long as an outline.
        source = cast(SupportsOutlines, self._stored.source)
        with self._stored.asking():
            return {rank: source.outline(self.number, rank) for rank in self.ranks}

    @cached_property
    def documents(self) -> Mapping[int, Json]:
        """What each rank's ``step.json`` says beside its records. Raises MissingError or ReadError."""
        return {rank: self._checked(rank, each.rest()) for rank, each in self._outlines.items()}

    @property
    def alike(self) -> Hashable:
        """See above."""
        return tuple((rank, each.alike) for rank, each in self._outlines.items())

    @property
    def kin(self) -> Hashable:
        """Equal for steps that are alike, and whose documents differ in integers alone, and in times."""
        return self.alike, tuple(each.kin for each in self._outlines.values())

    @property
    def numbers(self) -> Mapping[int, list[int]]:
        """These integers of each rank's document."""
        return {rank: each.numbers() for rank, each in self._outlines.items()}

    def series(self, most: int) -> tuple[Sequence[int], Mapping[int, Numbers]]:
        """This step and others that follow it and are its kin, and each rank's numbers ``[steps, numbers]``.

        Raises OverflowError where its own do not fit into 64 bits.
        """
        steps = [self.number]
        numbers = {rank: np.array([each.numbers()], np.int64) for rank, each in self._outlines.items()}
        following = {rank: each.following(most) for rank, each in self._outlines.items()}
        # All ranks must have the same.
        told = zip(*(each for each, _ in following.values()), strict=False)
        for first, *others in told:
            if any(each != first for each in others):
                break
            steps.append(first)
        count = len(steps) - 1
        if count:
            numbers = {
                rank: np.concatenate((own, following[rank][1][:count])) for rank, own in numbers.items()
            }
        return steps, numbers

    @property
    def number_places(self) -> Mapping[int, Json]:
        """Each rank's document, with the place of each of these integers among them in its stead."""
        return {rank: each.places() for rank, each in self._outlines.items()}

    @property
    def whole(self) -> Step:
        """The same step with its records. Raises ReadError."""
        step = Step(self._stored, self.number, self.ranks, self.complete, self._places)
        with self._stored.asking():
            records = {rank: each.records() for rank, each in self._outlines.items()}
        # What stands beside the records was checked by itself.
        step.documents = {
            rank: {**each, "records": self._checked_records(rank, records[rank])}
            for rank, each in self.documents.items()
        }
        return step

    def _checked(self, rank: int, rest: Json) -> Json:
        document = {"calls": [], **rest, "records": []}
        return check_step(document, self._where(rank), self.number)

    def _checked_records(self, rank: int, records: list[Json]) -> list[Json]:
        check_records(records, self._where(rank), self.number, self._stored.sound_records.problem)
        return records

    def _where(self, rank: int) -> str:
        return f"{self._stored.url}/{step_dir(self.number)}/step{rank_suffix(rank)}.json"


def has_outlines(stored: Stored) -> bool:
    """Whether a run's steps can be outlined."""
    return isinstance(stored.source, SupportsOutlines)


def outlined(run: Run, number: int) -> OutlinedStep:
    """A whole step of a run that `has_outlines`."""
    step = run.step(number)
    return OutlinedStep(run.stored, number, step.ranks, True, run.ranks)
