"""Steps that are like others: handed on whole, and checked here, or tensors found by others' records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..alike import AlikeStep, SupportsAlikeSteps, SupportsAlikeTensors
from ..errors import ReadError
from ..layout.names import rank_suffix, step_dir
from ..record import Json
from .documents import check_step
from .stored import Stored


def alike_steps(stored: Stored, rank: int) -> Iterator[AlikeStep]:
    """The steps of a rank that are like an earlier one, in order; none from a source that cannot tell.

    Raises ReadError where the source does, or a document is not sound.
    """
    source = stored.source
    if not isinstance(source, SupportsAlikeSteps):
        return
    with stored.asking():
        for step in source.alike_steps(rank):
            if isinstance(step, AlikeStep):
                where = f"{stored.url}/{step_dir(step.step)}/step{rank_suffix(rank)}.json"
                check_step(step.document, where, step.step)
                yield step


class AlikeTensors:
    """The tensors that steps of a run have in each other's stead (`SupportsAlikeTensors`)."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @cached_property
    def _source(self) -> SupportsAlikeTensors | None:
        # Looked up once: it is asked for each read.
        source = self._stored.source
        return source if isinstance(source, SupportsAlikeTensors) else None

    @property
    def are_found(self) -> bool:
        """Whether one record serves for all steps that are alike."""
        return self._source is not None

    @property
    def are_read_together(self) -> bool:
        """Whether `read_rows` can be asked."""
        return self._source is not None and self._stored.is_local

    def record_in(self, record: Json, step: int) -> Json:
        """The record of the same tensor in a step that is alike."""
        if self._source is None:
            return record
        with self._stored.asking():
            return self._source.record_in(record, step)

    def read_rows(self, record: Json, steps: Sequence[int], pieces: Any, target: Any) -> Any:
        """As the source does: a mask of the steps whose rows were read. Raises ReadError as it does."""
        assert self._source is not None
        with self._stored.asking():
            read = np.frombuffer(self._source.read_rows(record, steps, pieces, target), np.uint8) != 0
            if len(read) != len(steps):
                raise ReadError(f"{self._stored.url}: {len(read)} answers for {len(steps)} steps")
            return read
