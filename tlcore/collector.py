"""What a step's calls leave behind: sites, forms and copies, in a few flat lists.

This runs inside the model's forward pass, where each microsecond counts a thousand times a step. So
nothing is built here that could be built later: a call leaves a reference to its site, a tensor one to
its form, and a copy. Flat lists of shared objects also give Python's garbage collector nothing to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from . import device_statistics
from .batch import Batch, Measured
from .forms import FREED, QUEUE_FULL, RUN_FULL, Form, FormTable, Outcome, TensorFilter
from .host_memory import NO_CHUNK, Chunk
from .record import Direction
from .sites import Site
from .staging import FreedError, Stager, with_memory
from .structure import NO_ITEMS, TENSOR, Opaque, Scalar, Sketch, class_name, freeze

log = logging.getLogger("tlcore")
# A call whose structure keeps changing must not fill the memory.
_MOST_STRUCTURES = 64
_Tensor = torch.Tensor
_Sites = dict[Sketch, Site]
# A tensor's form, and where its copy lies.
Taken = tuple[Form, Chunk, int]


class CallSites:
    """One call of a module in a step: its three sides, each with a site for every structure it has had.

    Arguments are found by the sketch of the positional ones, or by a pair with that of the keywords.
    """

    __slots__ = ("call", "directory", "inputs", "module", "outputs", "post_fwd_inputs")

    def __init__(self, module: str, call: int, directory: str) -> None:
        self.module = module
        self.call = call
        self.directory = directory
        self.inputs: _Sites = {}
        self.outputs: _Sites = {}
        self.post_fwd_inputs: _Sites = {}

    def add(
        self, known: _Sites, key: Sketch, direction: Direction, sketch: Sketch, keywords: Sketch | None
    ) -> Site:
        """The site for a structure that this side has not had before."""
        if len(known) >= _MOST_STRUCTURES:
            known.clear()
        site = known[key] = self.site(direction, sketch, keywords)
        return site

    def site(self, direction: Direction, sketch: Sketch, keywords: Sketch | None = None) -> Site:
        """A site of this call."""
        return Site(self.module, self.call, self.directory, direction, sketch, keywords)


class Collector:
    """Gathers a step's calls and hands them over as batches; takes the leaves of their structures."""

    def __init__(
        self,
        stager: Stager,
        tensors: TensorFilter,
        submit: Callable[[Batch], None],
        capture: Literal["tensor", "stats", "both"] = "tensor",
    ) -> None:
        self._stager = stager
        self._capture = capture
        self._forms = FormTable(tensors)
        self._on_cpu = self._forms.on_cpu
        self._max_run_bytes = tensors.max_run_bytes
        self._run_bytes = 0
        self._submit = submit
        self._use(Batch(0))

    def begin_step(self, step: int) -> None:
        """Begin a step, and forget the one before."""
        self._use(Batch(step))
        self._stager.begin_step()

    def end_step(self) -> None:
        """Hand over what is left of the step."""
        self._hand_over(everything=True)

    def _use(self, batch: Batch) -> None:
        self._batch = batch
        self._add_site = batch.sites.append
        self._add_form = batch.forms.append
        self._add_chunk = batch.chunks.append
        self._add_offset = batch.offsets.append

    def inputs(self, sites: CallSites, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins: capture its positional and keyword arguments."""
        self._arguments(sites, sites.inputs, "inputs", args, kwargs)

    def post_fwd_inputs(self, sites: CallSites, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call is over: capture its arguments as they stand now."""
        self._arguments(sites, sites.post_fwd_inputs, "post_fwd_inputs", args, kwargs)

    def _arguments(
        self,
        sites: CallSites,
        known: _Sites,
        direction: Direction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        try:
            key = sketch = freeze(args, self)
            keywords = NO_ITEMS
            if kwargs:
                keywords = freeze(kwargs, self)
                key = (sketch, keywords)
            site = known.get(key)
            if site is None:
                site = sites.add(known, key, direction, sketch, keywords)
            self._add_site(site)
            if self._stager.full:
                self.hand_over_if_needed()
        except Exception as error:
            self._broken(sites, direction, error)

    def outputs(self, sites: CallSites, output: Any) -> None:
        """A call has returned: capture what."""
        try:
            if type(output) is _Tensor:
                self.tensor(output)
                sketch: Sketch = TENSOR
            else:
                sketch = freeze(output, self)
            site = sites.outputs.get(sketch)
            if site is None:
                site = sites.add(sites.outputs, sketch, "outputs", sketch, None)
            self._add_site(site)
            if self._stager.full:
                self.hand_over_if_needed()
        except Exception as error:
            self._broken(sites, "outputs", error)

    def raised(self, sites: CallSites, error: BaseException) -> None:
        """Note that the call raised instead of returning."""
        self._add_site(sites.site("outputs", Opaque(f"raised {class_name(error)}")))

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take one tensor of the structure being frozen: its form, and its copy if it is to be stored."""
        if type(tensor) is _Tensor and tensor.is_cpu:
            try:
                form = self._on_cpu.get((tensor.dtype, tensor.shape))
                if form is not None and tensor.is_contiguous() and not tensor.is_neg():
                    chunk = self._stager.chunk
                    begin = chunk.bytes
                    end = begin + form.nbytes
                    source = tensor.data_ptr()
                    if end <= chunk.size and source:
                        form.move(chunk.address + begin, source, form.nbytes)
                        chunk.bytes = (end + 63) & -64
                        self._add_form(form)
                        self._add_chunk(chunk)
                        self._add_offset(begin)
                        return
            except RuntimeError:
                # A tensor that hides its metadata or its memory: the long way finds out what it is.
                pass
        self._add(self._taken(tensor))

    def _add(self, taken: Taken) -> None:
        form, chunk, offset = taken
        self._add_form(form)
        self._add_chunk(chunk)
        self._add_offset(offset)

    def scalar(self, value: Scalar) -> None:
        """Take one number or string of the structure being frozen."""
        self._batch.scalars.append(value)

    def take(self, tensor: torch.Tensor) -> Taken:
        """Copy one tensor, if it is to be stored, for a side that is added later."""
        return self._taken(tensor)

    def _taken(self, tensor: torch.Tensor) -> Taken:
        form = self._forms.find(tensor)
        if form.outcome is not None:
            return self.without_copy(form)
        if self._max_run_bytes is not None and self._run_bytes + form.nbytes > self._max_run_bytes:
            # For good: smaller tensors that still fit would be a choice that nobody made.
            self._run_bytes = self._max_run_bytes
            return self.without_copy(form.refused(RUN_FULL))
        try:
            tensor = with_memory(tensor)
            if self._capture != "tensor" and self.measures_itself(tensor):
                place = self._stage_measured(tensor, form)
            else:
                place = self._stager.stage(tensor, form)
        except FreedError:
            return self.without_copy(form.refused(FREED))
        except Exception as error:
            log.debug("a tensor could not be copied", exc_info=True)
            return self.without_copy(form.refused(Outcome("failed", f"copy raised {type(error).__name__}")))
        if place is None:
            return self.without_copy(form.refused(QUEUE_FULL))
        self._run_bytes += form.nbytes
        return form, *place

    def measures_itself(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's device computes its statistics."""
        return tensor.is_cuda

    def _stage_measured(self, tensor: torch.Tensor, form: Form) -> tuple[Chunk, int] | None:
        """Stage the statistics that the device computes, and the tensor only if it may be stored."""
        vector = device_statistics.measure(tensor)
        staged = self._stager.stage(vector, self._forms.of_vector(vector))
        place = (NO_CHUNK, 0) if self._capture == "stats" else self._stager.stage(tensor, form)
        if staged is None or place is None:
            return None
        return Measured(place[0], *staged), place[1]

    def without_copy(self, form: Form) -> Taken:
        """What stands for a tensor of which there is no copy, as its form's outcome says."""
        return form, NO_CHUNK, 0

    def add(
        self,
        sites: CallSites,
        direction: Direction,
        sketch: Sketch,
        keywords: Sketch | None,
        tensors: Sequence[Taken],
        scalars: Sequence[Scalar],
    ) -> None:
        """Add one side of a call whose tensors were taken before."""
        for taken in tensors:
            self._add(taken)
        self._batch.scalars.extend(scalars)
        known: _Sites = getattr(sites, direction)
        key = sketch if keywords in (None, NO_ITEMS) else (sketch, keywords)
        self._add_site(known.get(key) or sites.add(known, key, direction, sketch, keywords))

    def hand_over_if_needed(self) -> None:
        """Give full memory to the pipeline; not while a tensor is taken whose side is not added yet."""
        if self._stager.must_hand_over:
            self._hand_over(everything=False)

    def _broken(self, sites: CallSites, direction: Direction, error: Exception) -> None:
        """Book a side that could not be captured; what was copied of it stays accounted for."""
        name = type(error).__name__
        log.warning("%s of %s could not be captured: %s: %s", direction, sites.module, name, error)
        batch = self._batch
        tensors = sum(site.tensors for site in batch.sites)
        del batch.scalars[sum(site.scalars for site in batch.sites) :]
        outcome = Outcome("failed", f"capture raised {name}")
        batch.forms[tensors:] = [form.refused(outcome) for form in batch.forms[tensors:]]
        self._add_site(sites.site(direction, ("list", (TENSOR,) * (len(batch.forms) - tensors))))

    def _hand_over(self, everything: bool) -> None:
        batch = self._batch
        batch.memory = self._stager.take(everything)
        self._use(Batch(batch.step))
        if batch.sites or batch.memory:
            self._submit(batch)
