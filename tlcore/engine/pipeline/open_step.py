"""What the pipeline gathers of a step until it is committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...layout.templates import Templates
from ...ledger import Counts
from ..batch import Batch
from .inspector import Inspected
from .planner import Plan, with_bare_last


@dataclass(slots=True)
class OpenStep:
    """What the pipeline gathers of a step until it is committed.

    ``first`` has the name under which each kind of tensor with certain bytes was stored first. ``values``
    has what the templates leave open. What is ``waiting`` is written at its end. ``undecided`` is its batch
    where rows of that may have to go; one whose memory was needed before that was known is ``whole``.
    """

    counts: Counts = field(default_factory=Counts)
    calls: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    first: dict[tuple[str, int], str] = field(default_factory=dict)
    written: int = 0
    bytes_written: int = 0
    error: BaseException | None = None
    waiting: tuple[Batch, Plan] | None = None
    undecided: Batch | None = None
    whole: bool = False

    def add(self, plan: Plan, examined: Inspected | None) -> None:
        """Take over all that a batch's plan says."""
        self.counts.add(plan.counts)
        self.calls += plan.calls if examined is None else examined.calls
        if examined is not None:
            self.values.update(examined.values)
        self.plans.append(plan)

    @property
    def templates(self) -> Templates:
        """The structure documents of all plans."""
        texts = [plan.texts for plan in self.plans]
        # Most steps are one batch, whose texts are then joined only once.
        filled = [each for each in texts if each.templates]
        if len(filled) < 2:
            return filled[0].templates if filled else Templates()
        joined = Templates()
        for each in filled:
            joined.update(each.templates)
        return with_bare_last(joined, frozenset[str]().union(*(each.bare for each in filled)))
