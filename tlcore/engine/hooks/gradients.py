"""Gradients of what calls took and gave, as backward computes them; the graph stays as it is.

A gradient is that of the tensor: of all its uses together. It arrives at some time after its call, so
that a side waits here until all its tensors have one, and is then captured as a whole.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from ...layout.directions import gradient_direction
from ...layout.structure import KeptLeaves, Scalar, TreeSpec, flatten
from ...ledger import GRADIENT_ELSEWHERE, NO_GRADIENT, NO_GRADIENT_WANTED, Outcome
from ..calls import Call
from ..filters.tensors import TensorSpec
from ..staging.dtensors import is_dtensor, local_part
from ..staging.host_memory import Chunk

log = logging.getLogger("tlcore")
# A tensor's form, and where its copy lies.
Taken = tuple[TensorSpec, Chunk, int]
# Given a gradient.
Arrival = Callable[[Any], None]


class Collects(Protocol):
    """What takes gradients: a `Collector`, which says more of each method."""

    def spec_of(self, tensor: torch.Tensor) -> TensorSpec:
        """What the filters say of a tensor."""

    def take(self, tensor: torch.Tensor) -> Taken:
        """Copy one tensor, if it is to be stored."""

    def without_copy(self, spec: TensorSpec) -> Taken:
        """What stands for a tensor of which there is no copy."""

    def add(
        self,
        sides: Call,
        direction: str,
        treespec: TreeSpec,
        keywords: TreeSpec | None,
        tensors: Sequence[Taken],
        scalars: Sequence[Scalar],
    ) -> None:
        """Add one side of a call."""

    def hand_over_if_needed(self) -> None:
        """Give full memory to the pipeline."""


class Gradients:
    """The gradients of one step after the other, for a collector."""

    def __init__(self, collector: Collects) -> None:
        self._collector = collector
        self._open = False
        self._owner = 0
        self._waiting: list[_Side] = []
        self._handles: list[RemovableHandle] = []
        # Who is told of a tensor's gradient, by the tensor's identity and how often it was changed in place.
        self._known: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], list[Arrival]]] = {}
        # Tensors of the user's own, which must not keep an empty dictionary of hooks.
        self._leaves: list[torch.Tensor] = []
        # A device's part of backward runs in a thread of its own.
        self._lock = threading.Lock()
        # Whether there was ever a tensor to wait for.
        self.awaited = False

    def begin_step(self) -> None:
        """Listen to backward from now on."""
        self._open = True
        self._owner = threading.get_ident()

    def arguments(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins: wait for the gradients of its arguments."""
        self._watch(call, "inputs", args, kwargs)

    def result(self, call: Call, output: Any) -> None:
        """A call has returned: wait for the gradients of its result."""
        self._watch(call, "outputs", output, None)

    def _watch(self, call: Call, direction: str, value: Any, kwargs: dict[str, Any] | None) -> None:
        if not self._open or not torch.is_grad_enabled():
            return
        try:
            found = KeptLeaves()
            treespec = flatten(value, found)
            keywords = None if kwargs is None else flatten(kwargs, found)
            if any(each.requires_grad for each in found.tensors):
                self._wait(_Side(call, direction, treespec, keywords, found.scalars), found.tensors)
        except Exception as error:
            log.warning("no gradients of %s are captured: %s", call.module, error)

    def _wait(self, side: _Side, tensors: Sequence[torch.Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            # A gradient has the parts that its tensor has.
            spec = self._collector.spec_of(local_part(tensor) if is_dtensor(tensor) else tensor)
            if not tensor.requires_grad:
                spec = spec.unwanted(NO_GRADIENT_WANTED)
            elif spec.outcome is None:
                spec = self._hook(tensor, spec, self._arrival(side, number))
            side.specs.append(spec)
        side.begin()
        self._waiting.append(side)

    def _hook(self, tensor: torch.Tensor, spec: TensorSpec, arrival: Arrival) -> TensorSpec:
        """Have a gradient told; the tensor's form until it comes."""
        key = id(tensor), tensor._version
        known = self._known.get(key)
        if known is not None and known[0]() is tensor:
            known[1].append(arrival)
            return spec.refused(NO_GRADIENT)
        arrivals = [arrival]
        try:
            if tensor.is_leaf and tensor._backward_hooks is None:
                self._leaves.append(tensor)
            self._handles.append(tensor.register_hook(_telling(arrivals)))  # type: ignore[no-untyped-call]
        except Exception as error:
            return spec.refused(Outcome("failed", f"capture raised {type(error).__name__}"))
        self._known[key] = weakref.ref(tensor), arrivals
        self.awaited = True
        return spec.refused(NO_GRADIENT)

    def _arrival(self, side: _Side, number: int) -> Arrival:
        def arrival(gradient: Any) -> None:
            # Whatever goes wrong here must not end backward.
            try:
                if not (self._open and isinstance(gradient, torch.Tensor)):
                    return
                with self._lock:
                    if self._mine(gradient):
                        self._arrives(side, number, gradient)
                    else:
                        side.elsewhere(number)
            except Exception as error:
                log.warning("a gradient of %s could not be captured: %s", side.call.module, error)

        return arrival

    def _mine(self, gradient: torch.Tensor) -> bool:
        """Whether it is of the step's own thread, in which all of the CPU's part of backward runs."""
        return not gradient.is_cpu or threading.get_ident() == self._owner

    def _arrives(self, side: _Side, number: int, gradient: torch.Tensor) -> None:
        backward = _backward()
        if side.backward != backward and any(each is not None for each in side.came):
            # Another backward, and the one before has not given all.
            self._add(side)
        side.backward = backward
        if len(side.left) == 1 and number in side.left:
            side.came[number] = gradient
            self._add(side)
        else:
            # It may be changed in place as soon as backward goes on.
            side.came[number] = gradient.detach().clone()
            side.left.discard(number)

    def _add(self, side: _Side) -> None:
        """Capture what has come, and begin anew."""
        collector, pairs = self._collector, list(zip(side.specs, side.came, strict=True))
        try:
            taken = [
                collector.without_copy(spec) if gradient is None else collector.take(gradient)
                for spec, gradient in pairs
            ]
        except Exception as error:
            log.warning("a gradient of %s could not be captured: %s", side.call.module, error)
            failed = Outcome("failed", f"capture raised {type(error).__name__}")
            specs = [spec if gradient is None else spec.unwanted(failed) for spec, gradient in pairs]
            taken = [collector.without_copy(spec) for spec in specs]
        side.backwards += 1
        direction = gradient_direction(side.direction, side.backwards)
        collector.add(side.call, direction, side.treespec, side.keywords, taken, side.scalars)
        collector.hand_over_if_needed()
        side.begin()

    def end_step(self) -> None:
        """Capture what has not come whole; what did not come at all counts as skipped."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        for leaf in self._leaves:
            if not leaf._backward_hooks:
                leaf._backward_hooks = None
        self._known.clear()
        waiting, self._waiting, self._handles, self._leaves = self._waiting, [], [], []
        for side in waiting:
            if not side.backwards or any(each is not None for each in side.came):
                self._add(side)


def _backward() -> int:
    """The number of the backward that this thread works for."""
    return torch._C._current_graph_task_id()


def _telling(arrivals: Sequence[Arrival]) -> Arrival:
    """A hook that tells whoever took a tensor before it tells who gave it, as backward goes."""

    def tell(gradient: Any) -> None:
        for arrival in reversed(arrivals):
            arrival(gradient)

    return tell


class _Side:
    """One side of a call whose gradients are awaited, one backward after the other."""

    def __init__(
        self,
        call: Call,
        direction: str,
        treespec: TreeSpec,
        keywords: TreeSpec | None,
        scalars: Sequence[Scalar],
    ) -> None:
        self.call = call
        self.direction = direction
        self.treespec = treespec
        self.keywords = keywords
        self.scalars = scalars
        # Of each tensor: its form while no gradient of it has come.
        self.specs: list[TensorSpec] = []
        self.came: list[torch.Tensor | None] = []
        self.left: set[int] = set()
        self.backwards = 0
        # The backward that gave what has come.
        self.backward = -1

    def elsewhere(self, number: int) -> None:
        """A gradient came in a thread that is not captured."""
        if self.specs[number].outcome == NO_GRADIENT:
            self.specs[number] = self.specs[number].unwanted(GRADIENT_ELSEWHERE)
            self.left.discard(number)

    def begin(self) -> None:
        """Wait for all of them."""
        self.came = [None] * len(self.specs)
        self.left = {at for at, spec in enumerate(self.specs) if spec.outcome == NO_GRADIENT}
