"""Steps that are handed on whole, since they are like an earlier one; what they say is checked here."""

from __future__ import annotations

from collections.abc import Iterator

from ..alike import AlikeStep, SupportsAlikeSteps
from ..layout.names import rank_suffix, step_dir
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
