"""The copy of one tensor, or why there is none: memory, statistics of its device, the bound of the run."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ...config.configuration import Captured
from ...layout.row_scale import restored
from ...ledger import FREED, QUEUE_FULL, RUN_FULL, Outcome
from ...statistics import channels_of_tensors
from ...statistics import device as device_statistics
from ..batch import Measured
from ..filters.kept_rows import WaitingSpec
from ..filters.run_bytes import RunBytes
from ..filters.tensors import TensorSpec, TensorSpecs
from ..staging.accelerator import accelerator_of, recording
from ..staging.conversion import converted
from ..staging.host_memory import NO_CHUNK, Chunk
from ..staging.stager import FreedError, Stager, with_memory

log = logging.getLogger("tlcore")
# A tensor's form, and where its copy lies.
Taken = tuple[TensorSpec, Chunk, int]


def without_copy(spec: TensorSpec) -> Taken:
    """What stands for a tensor of which there is no copy, as its form's outcome says."""
    return spec, NO_CHUNK, 0


class Copies:
    """Copies tensors while the run has ``room``; ``walker`` is told which it may copy by itself."""

    def __init__(
        self,
        stager: Stager,
        forms: TensorSpecs,
        capture: Captured,
        room: RunBytes | None,
        walker: Any,
    ) -> None:
        self._stager = stager
        self._forms = forms
        self._capture = capture
        self._room = room
        self._walker = walker

    def of(self, tensor: torch.Tensor, spec: TensorSpec, known: bool) -> Taken:
        """The copy of a tensor of this form; one without a copy has an outcome that says why.

        With ``known`` the walker may copy the next one like it by itself.
        """
        if spec.outcome is not None:
            return without_copy(spec)
        if self._room is not None and not self._fits(self._room, spec):
            return without_copy(spec.refused(RUN_FULL))
        taken = self._copy(tensor, spec)
        if taken[0].outcome is not None:
            if self._room is not None and not isinstance(spec, WaitingSpec):
                self._room.give_back(spec.nbytes)
        elif known and spec.plain and self._walker is not None:
            self._walker.know(tensor, spec, spec.nbytes)
        return taken

    @staticmethod
    def _fits(room: RunBytes, spec: TensorSpec) -> bool:
        # Of rows that may have to go, those that stay are counted, when that is known.
        return not room.full if isinstance(spec, WaitingSpec) else room.take(spec.nbytes)

    def _copy(self, tensor: torch.Tensor, spec: TensorSpec) -> Taken:
        try:
            tensor = with_memory(tensor)
            if spec.original:
                tensor = converted(tensor, spec.dtype)
            if self._capture != "tensor" and not isinstance(spec, WaitingSpec) and measures_itself(tensor):
                place = self._stage_measured(tensor, spec)
            else:
                place = self._stager.stage(tensor, spec)
        except FreedError:
            return without_copy(spec.refused(FREED))
        except Exception as error:
            log.debug("a tensor could not be copied", exc_info=True)
            return without_copy(spec.refused(Outcome("failed", f"copy raised {type(error).__name__}")))
        if place is None:
            return without_copy(spec.refused(QUEUE_FULL))
        return spec, *place

    def _stage_measured(self, tensor: torch.Tensor, spec: TensorSpec) -> tuple[Chunk, int] | None:
        """Stage the statistics that the device computes, and the tensor only if it may be stored."""
        if recording():
            raise RuntimeError("a graph is being recorded")
        values = restored(tensor, spec.original) if spec.is_scaled else tensor
        channels = self._capture == "channels"
        vector = channels_of_tensors.measure(values) if channels else device_statistics.measure(values)
        staged = self._stager.stage(vector, self._forms.of_vector(vector))
        place = (NO_CHUNK, 0) if self._capture != "both" else self._stager.stage(tensor, spec)
        if staged is None or place is None:
            return None
        return Measured(place[0], *staged), place[1]


def measures_itself(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device computes its statistics."""
    if tensor.is_cpu:
        return False
    accelerator = accelerator_of(tensor.device.type)
    return accelerator is not None and accelerator.measures
