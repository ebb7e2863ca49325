"""What a step's calls leave behind: sides, specs and copies, in a few flat lists.

This runs inside the model's forward pass, where each microsecond counts a thousand times a step. So
nothing is built here that could be built later: a call leaves a reference to its side, a tensor one to
its form, and a copy. Flat lists of shared objects also give Python's garbage collector nothing to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from ...config.configuration import Captured
from ...hotpath.looking import can_look
from ...hotpath.native import extension
from ...layout.structure import NO_ITEMS, TENSOR, Opaque, Scalar, TreeSpec, class_name, flatten
from ...ledger import ROWS_UNKNOWN, Counts, Outcome
from ...record import Direction
from ..batch import Batch
from ..calls import Call, CallSide, Sides
from ..filters.rows import Begun, StepRows
from ..filters.tensors import TensorFilter, TensorSpec, TensorSpecs
from ..staging.dtensors import (
    arrived,
    is_dtensor,
    is_on_its_way,
    local_part,
    placements_of,
    placements_of_rows,
)
from ..staging.stager import Stager
from .copies import Copies, Taken, without_copy
from .gradients import Gradients
from .objects_of_step import ObjectsOfStep
from .tracing import PassedBy

log = logging.getLogger("tlcore")


class Collector:
    """Gathers a step's calls and hands them over as batches; takes the leaves of their structures.

    With ``rows``, only those rows of each tensor are copied, in every step, or in one that begins with them.
    Where they cannot be told, nothing of the tensor is stored: rows of requests that were not chosen must
    not be. Where ``narrows``, the modules differ in whose rows are kept, which takes the Python half.
    """

    def __init__(
        self,
        stager: Stager,
        tensors: TensorFilter,
        capture: Captured = "tensor",
        objects: Container[str] = (),
        rows: StepRows | None = None,
        narrows: bool = False,
    ) -> None:
        self.opens = objects
        self._rows = self._usual_rows = rows
        self._narrows = narrows
        self._stager = stager
        self._forms = TensorSpecs(tensors)
        # Takes what is handed over, as long as anybody captures.
        self.submit: Callable[[Batch], object] = lambda batch: None
        # Told before calls go out of sight.
        self.before_hand_over: Callable[[], object] | None = None
        # Of the tensors that calls take and give, where these are captured, too.
        self.gradients: Gradients | None = None
        self.passed_by = PassedBy()
        self._noted = 0
        # Whether a part of the step has been handed over.
        self._in_parts = False
        self._objects = ObjectsOfStep(self._forms)
        self._leaving = False
        self._placements = ""
        # Parts that hooks may have taken out of a result, by the address of their memory.
        self._parts: dict[int, Any] = {}
        # The extension's walk, which takes plain CPU tensors by itself; None where Python does all.
        self.walker = self._new_walker()
        self._copies = Copies(stager, self._forms, capture, tensors.room, self.walker)
        self._use(Batch(0))

    def _new_walker(self) -> Any:
        if not can_look() or self._rows is not None or self._narrows:
            return None
        walker = extension.Walker(self.tensor, lambda value, seen: flatten(value, self, seen))
        walker.fill(self._stager.chunk)
        walker.watch(self._stager.full)
        self._stager.on_chunk = walker.fill
        self._forms.on_clear = walker.forget
        return walker

    def begin_step(self, step: int, rows: StepRows | None = None) -> None:
        """Begin a step, in which perhaps only some ``rows`` are copied, and forget the one before."""
        self._rows = rows or self._usual_rows
        if rows is not None and self.walker is not None:
            self.walker.forget()  # Then each tensor is looked at here.
        self._noted = 0
        if not self._batch.is_untouched:
            self._use(Batch(step))
        self._batch.step = step
        self._stager.begin_step()
        if self.gradients is not None:
            self.gradients.begin_step()

    def calls_begun(self) -> list[Begun]:
        """The calls that began since this was asked last."""
        sides, first = self._batch.sides, self._noted
        self._noted = len(sides)
        return [(side.directory, side.module, side.call) for side in sides[first:] if side.begins]

    def end_step(self) -> Counts:
        """Hand over what is left of the step; the ledger of what was not looked into."""
        if self.gradients is not None:
            self.gradients.end_step()
        self._hand_over(everything=True)
        return self._objects.counted()

    def _use(self, batch: Batch) -> None:
        self._batch = batch
        self._add_site = batch.sides.append
        self._add_form = batch.specs.append
        self._add_chunk = batch.chunks.append
        self._add_offset = batch.offsets.append
        if self.walker is not None:
            self.walker.use(batch.sides, batch.specs, batch.chunks, batch.offsets, batch.scalars)

    def hears(self, call: Call) -> bool:
        """Whether anything of a call is to be captured in this step; its tensors come now."""
        return self._rows is None or self._rows.hears(call.module)

    def inputs(self, sides: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins: capture its positional and keyword arguments."""
        self._arguments(sides, sides.inputs, "inputs", args, kwargs)
        if self.gradients is not None:
            self.gradients.arguments(sides, args, kwargs)

    def post_fwd_inputs(self, sides: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call is over: capture its arguments as they stand now."""
        self._arguments(sides, sides.post_fwd_inputs, "post_fwd_inputs", args, kwargs)

    def _arguments(
        self,
        sides: Call,
        known: Sides,
        direction: Direction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not self.hears(sides):
            return
        try:
            if self.walker is not None:
                self.walker.leaving = False
                unknown = self.walker.arguments(known, args, kwargs)
            else:
                self._leaving = False
                unknown = self._flatten_arguments(known, args, kwargs)
            self._end_arguments(sides, known, direction, unknown, kwargs)
        except Exception as error:
            self.broken(sides, direction, error)

    def end_inputs(
        self, sides: Call, unknown: tuple[TreeSpec, TreeSpec] | None, kwargs: dict[str, Any]
    ) -> None:
        """What the extension's walk leaves to be done once it has taken a call's arguments; it may raise."""
        self._end_arguments(sides, sides.inputs, "inputs", unknown, kwargs)

    def _end_arguments(
        self,
        sides: Call,
        known: Sides,
        direction: Direction,
        unknown: tuple[TreeSpec, TreeSpec] | None,
        kwargs: dict[str, Any],
    ) -> None:
        if unknown is not None:
            treespec, keywords = unknown
            key = unknown if kwargs else treespec
            self._add_site(sides.add(known, key, direction, treespec, keywords))
        if self._stager.full:
            self.hand_over_if_needed()

    def outputs(self, sides: Call, output: Any) -> None:
        """A call has returned: capture what."""
        if not self.hears(sides):
            return
        try:
            self.end_outputs(sides, self._result(sides.outputs, output))
        except Exception as error:
            self.broken(sides, "outputs", error)
        if self.gradients is not None:
            self.gradients.result(sides, output)

    def end_outputs(self, sides: Call, unknown: TreeSpec | None) -> None:
        """What the extension's walk leaves to be done once it has taken a call's result; it may raise."""
        if unknown is not None:
            self._add_site(sides.add(sides.outputs, unknown, "outputs", unknown, None))
        if self._stager.full:
            self.hand_over_if_needed()

    def tapped(
        self,
        call: Call,
        direction: Direction,
        known: Sides,
        value: Any,
        make: Callable[[TreeSpec], CallSide],
    ) -> None:
        """A call shows a value in the midst of it: capture that; ``make`` gives a structure's new side."""
        if self._rows is not None and not self._rows.hears(call.module, direction):
            return
        try:
            self.end_tapped(self._result(known, value), make)
        except Exception as error:
            self.broken(call, direction, error)

    def end_tapped(self, unknown: TreeSpec | None, make: Callable[[TreeSpec], CallSide]) -> None:
        """What the extension's walk leaves to be done once it has taken such a value; it may raise."""
        if unknown is not None:
            self._add_site(make(unknown))
        if self._stager.full:
            self.hand_over_if_needed()

    def _flatten_arguments(
        self, known: Sides, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TreeSpec, TreeSpec] | None:
        """What the extension's ``arguments`` does: None where the side is known, and added."""
        both = flatten(args, self), flatten(kwargs, self)
        side = known.get(both if kwargs else both[0])
        if side is None:
            return both
        self._add_site(side)
        return None

    def _result(self, known: Sides, output: Any) -> TreeSpec | None:
        """Take a value: None where its side is known, and added, else its structure."""
        if (walker := self.walker) is not None and not self._parts:
            walker.leaving = True
            unknown: TreeSpec | None = walker.result(known, output)
            return unknown
        self._leaving = True
        treespec = flatten(output, self)
        side = known.get(treespec)
        if side is None:
            return treespec
        self._add_site(side)
        return None

    def raised(self, sides: Call, error: BaseException) -> None:
        """Note that the call raised instead of returning."""
        if not self.hears(sides):
            return
        known, what = sides.outputs, Opaque(f"raised {class_name(error)}")
        self._add_site(known.get(what) or sides.add(known, what, "outputs", what, None))

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take one tensor of the structure being frozen: its form, and its copy if it is to be stored."""
        self._add(self._taken(tensor))

    def _add(self, taken: Taken) -> None:
        spec, chunk, offset = taken
        self._add_form(spec)
        self._add_chunk(chunk)
        self._add_offset(offset)

    def scalar(self, value: Scalar) -> None:
        """Take one number or string of the structure being frozen."""
        self._batch.scalars.append(value)

    def unopened(self, value: Any, reason: str) -> None:
        """Count what may hold tensors and is not looked into, in the structure being frozen."""
        self._objects.add(value, reason)

    def first(self, tensor: torch.Tensor) -> bool:
        """Whether a cache's tensor has not been taken in this step as it stands now."""
        return self._objects.first(tensor, self._leaving if self.walker is None else self.walker.leaving)

    def spec_of(self, tensor: torch.Tensor) -> TensorSpec:
        """What the filters say of a tensor."""
        return self._forms.find(tensor)

    def take(self, tensor: torch.Tensor) -> Taken:
        """Copy one tensor, if it is to be stored, for a side that is added later."""
        return self._taken(tensor)

    def _taken(self, tensor: torch.Tensor) -> Taken:
        if is_on_its_way(tensor):
            tensor = arrived(tensor)
        if is_dtensor(tensor):
            self._placements = placements_of(tensor)
            try:
                return self._taken(local_part(tensor))
            finally:
                self._placements = ""
        if self._parts and not self._placements and tensor.data_ptr() in self._parts:
            return self._taken_part(tensor, self._parts[tensor.data_ptr()])
        if self._rows is not None:
            kept = self._rows.cut(tensor)
            placements: str | None = self._placements
            if kept is not None and placements and self._rows.cut_along is not None:
                placements = placements_of_rows(placements, self._rows.cut_along, kept.shape)
            waiting = self._rows.waiting
            if kept is None or placements is None or (placements and waiting is not None):
                return self.without_copy(self._forms.find(tensor).refused(ROWS_UNKNOWN))
            tensor, self._placements = kept, placements
            if waiting is not None:
                self._batch.waits = True
                return self._copies.of(tensor, waiting.waiting(self._forms.find(tensor)), known=False)
        spec = self._forms.find(tensor)
        if self._placements:
            spec = spec.as_part(self._placements)
        # Where only some rows are copied, the walker must not take whole tensors.
        return self._copies.of(tensor, spec, known=self._rows is None)

    def _taken_part(self, tensor: torch.Tensor, whole: Any) -> Taken:
        if tuple(tensor.shape) == tuple(whole._local_tensor.shape):
            self._placements = placements_of(whole)
        try:
            parts, self._parts = self._parts, {}
            return self._taken(tensor)
        finally:
            self._placements, self._parts = "", parts

    def parts_of(self, output: Any) -> None:
        """Note the distributed tensors that a call has returned, as hooks may hand on this rank's parts."""
        listed = output if isinstance(output, (tuple, list)) else (output,)
        found = [each for each in listed if isinstance(each, torch.Tensor) and is_dtensor(each)]
        self._parts = {local_part(each).data_ptr(): each for each in found}

    def without_copy(self, spec: TensorSpec) -> Taken:
        """What stands for a tensor of which there is no copy, as its form's outcome says."""
        return without_copy(spec)

    def add(
        self,
        sides: Call,
        direction: Direction,
        treespec: TreeSpec,
        keywords: TreeSpec | None,
        tensors: Sequence[Taken],
        scalars: Sequence[Scalar],
    ) -> None:
        """Add one side of a call whose tensors were taken before."""
        for taken in tensors:
            self._add(taken)
        self._batch.scalars.extend(scalars)
        known = sides.sides_of(direction)
        key = treespec if keywords in (None, NO_ITEMS) else (treespec, keywords)
        self._add_site(known.get(key) or sides.add(known, key, direction, treespec, keywords))

    def shown(
        self,
        call: Call,
        direction: Direction,
        treespec: TreeSpec,
        keywords: TreeSpec | None,
        tensors: Sequence[torch.Tensor],
        scalars: Sequence[Scalar],
    ) -> None:
        """A whole side of a call, whose structure is known already: capture it."""
        try:
            taken = [self.take(tensor) for tensor in tensors]
            self.add(call, direction, treespec, keywords, taken, scalars)
            self.hand_over_if_needed()
        except Exception as error:
            self.broken(call, direction, error)

    def hand_over_if_needed(self) -> None:
        """Give full memory to the pipeline; not while a tensor is taken whose side is not added."""
        if self._stager.must_hand_over:
            self._hand_over(everything=False)

    def broken(self, sides: Call, direction: Direction, error: Exception) -> None:
        """Book a side that could not be captured; what was copied of it stays accounted for."""
        name = type(error).__name__
        log.warning("%s of %s could not be captured: %s: %s", direction, sides.module, name, error)
        batch = self._batch
        tensors = sum(side.tensors for side in batch.sides)
        del batch.scalars[sum(side.scalars for side in batch.sides) :]
        outcome = Outcome("failed", f"capture raised {name}")
        batch.specs[tensors:] = [spec.refused(outcome) for spec in batch.specs[tensors:]]
        self._add_site(sides.side(direction, ("list", (TENSOR,) * (len(batch.specs) - tensors))))

    def _hand_over(self, everything: bool) -> None:
        if self.before_hand_over is not None and not everything:
            self.before_hand_over()
        batch = self._batch
        batch.memory = self._stager.take(everything)
        batch.is_whole_step = everything and not self._in_parts
        self._in_parts = not everything
        self._noted = 0
        self._use(Batch(batch.step, waits=batch.waits))
        if batch.sides or batch.memory:
            self.submit(batch)
