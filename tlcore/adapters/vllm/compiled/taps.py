"""Capture inside a compiled model: what its taps show becomes a step's sides, as if hooks had run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ....engine.filters.modules import ModuleFilter
from ....engine.hooks import tap_op
from ....engine.hooks.collector import Collector
from ....engine.hooks.copies import Taken
from ....engine.session import Session
from ....engine.staging.accelerator import recording
from ..frontend.check import unknown_vllm
from .dry_run import DryRun, Plan, Side
from .eager_steps import EagerSteps, when_pass_begins
from .graph_copies import StaticCopies
from .tapped import install_taps

log = logging.getLogger("vllm.tlcore")
_REASON = "the compiled model did not run all of its taps; see the log"


class Taps:
    """Fills the collector in a step with what a plan's taps show; a tap that does not fire is booked.

    The graph may come from a cache that was made by another configuration after all, or be replayed from
    where no tap was recorded: then tensors are missing, and counted as failed rather than left out.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._static = StaticCopies(device)
        self._collector: Collector | None = None
        self._fired: list[int] = []
        self._taken: dict[Side, dict[int, Taken]] = {}
        self._waiting: deque[Side] = deque()
        self._broken = False

    @property
    def modules(self) -> Collection[nn.Module]:
        """The tapped modules."""
        return self._plan.slots.keys()

    def begin_pass(self) -> None:
        """A forward pass of the model begins, in a step or in one that is recorded as a graph."""
        self._static.begin_pass()

    def begin_step(self, collector: Collector) -> None:
        """Take what the taps show from now on."""
        self._fired = [0] * len(self._plan.users)
        self._taken = {}
        self._waiting = deque(side for side in self._plan.sides if side.wanted)
        self._static.begin_step()
        self._collector = collector
        tap_op.receive_with(self)

    def fire(self, slot: int, tensor: torch.Tensor) -> None:
        """A tap's tensor: part of a graph being recorded, of the step, or of no interest."""
        try:
            if not tensor.is_cpu and recording():
                self._static.record(slot, tensor)
            elif self._collector is not None:
                self._take(self._collector, slot, tensor)
        except Exception as error:
            if not self._broken:
                self._broken = True
                log.error("a tap could not be captured (said once): %s", error, exc_info=True)

    def end_step(self) -> str | None:
        """End the step; what is wrong with it, if anything: tensors that no tap showed count as failed."""
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        for slot, copy in self._static.replayed():
            self._take(collector, slot, copy)
        missing = 0
        while self._waiting:
            missing += self._put(collector, self._waiting.popleft())
        if missing:
            log.error(
                "%d tensors of a selected step were not shown by the compiled model and count as failed;"
                " if this goes on, delete vLLM's compilation cache",
                missing,
            )
        return _REASON if missing else None

    def _take(self, collector: Collector, slot: int, tensor: torch.Tensor) -> None:
        users, number = self._plan.users[slot], self._fired[slot]
        self._fired[slot] = number + 1
        if number >= len(users):
            return
        side, index = users[number]
        if not (side.wanted and collector.hears(side.sides)):
            return
        self._taken.setdefault(side, {})[index] = collector.take(tensor)
        while self._waiting and self._complete(collector, self._waiting[0]):
            self._put(collector, self._waiting.popleft())
        if not self._taken:
            # Only now does every copy belong to a side.
            collector.hand_over_if_needed()

    def _complete(self, collector: Collector, side: Side) -> bool:
        if not side.specs or not collector.hears(side.sides):
            return True
        return len(self._taken.get(side, ())) == len(side.specs)

    def _put(self, collector: Collector, side: Side) -> int:
        """Add the side to the step; how many of its tensors should have been shown but were not."""
        taken = self._taken.pop(side, {})
        if not collector.hears(side.sides):
            return 0
        found = [taken.get(i) for i in range(len(side.specs))]
        leaves = [each or collector.without_copy(spec) for each, spec in zip(found, side.specs, strict=True)]
        collector.add(side.sides, side.direction, side.treespec, side.keywords, leaves, side.scalars)
        return found.count(None) if side.tappable else 0


def tap_model(worker: Any, session: Session) -> list[str]:
    """Attach ``session`` to a worker's model by taps, before vLLM compiles it; the table of its slots.

    Runs one eager forward pass. Raises CaptureError, naming the vLLM version, where that cannot be done.
    """
    runner = worker.model_runner
    if not hasattr(runner, "profile_run"):
        raise unknown_vllm(f"{type(runner).__name__} has no profile_run")
    model: nn.Module = runner.get_model()
    selector = ModuleFilter(session.config.module_call_match)
    dry_run = DryRun(model, selector, session.config.log_post_fwd_inputs)
    with EagerSteps(runner).step():
        plan = dry_run.run(runner.profile_run)
    device = torch.device(runner.device)
    taps = Taps(plan, device)
    anchor = torch.zeros(1, device=device)
    for module, slots in plan.slots.items():
        install_taps(module, slots, anchor, plan.code[module])
    session.attach(model, taps)
    when_pass_begins(taps.begin_pass)
    # For the graphs that are recorded before the first step.
    tap_op.receive_with(taps)
    return plan.table
