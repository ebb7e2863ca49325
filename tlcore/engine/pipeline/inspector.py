"""Looking at staged tensors before they are stored: statistics, and whether a tensor is worth its bytes.

This runs on the pipeline's thread. What it decides it writes into the batch as other specs, so that names,
texts and the ledger follow from them as ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
import xxhash

from ...config.configuration import Config
from ...layout.row_scale import restored
from ...ledger import FINITE, RUN_FULL, STATISTICS_ONLY, Outcome
from ...statistics import device as device_statistics
from ...statistics.host import HostStatistics
from ...statistics.summary import Statistics
from ..batch import Batch, Measured, Part, batch_of, parts_of
from ..filters.tensors import TensorSpec, move_large
from ..staging.host_memory import Chunk

log = logging.getLogger("tlcore")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is looked at: ``statistics`` of every tensor, and which ``tensors`` are stored.

    ``max_run_bytes`` bounds those that are; ``post_inputs`` says that inputs are captured after each call
    too.
    """

    statistics: bool
    tensors: bool
    only_nonfinite: bool
    max_run_bytes: int | None
    post_inputs: bool

    @classmethod
    def of(cls, config: Config) -> Inspection:
        """What a configuration asks for."""
        return cls(
            statistics=config.capture in ("stats", "both"),
            tensors=config.capture != "stats",
            only_nonfinite=config.on_condition == "nonfinite",
            max_run_bytes=config.max_run_bytes,
            post_inputs=config.log_post_fwd_inputs,
        )

    @property
    def needed(self) -> bool:
        """Whether anything is to be looked at."""
        return self.statistics or self.only_nonfinite


class Inspected(NamedTuple):
    """A batch with the specs that were decided on.

    ``calls`` are the directories of the calls that begin in it. ``values`` are the statistics' texts of each
    structure document (`Statistics.texts`, one tensor after the other).
    """

    batch: Batch
    calls: list[str]
    values: dict[str, list[str]]


class _Finding(NamedTuple):
    """What was seen of one tensor; ``error`` names why it has no statistics although it should."""

    statistics: Statistics | None = None
    nonfinite: bool = False
    error: str | None = None


class _Kept(Chunk):
    """Memory of our own, for what outlives its batch."""

    __slots__ = ()


_NOTHING = _Finding()


@dataclass(slots=True)
class Inspector:
    """Examines the batches of one step after the other; used by one thread at a time.

    The condition holds for a whole call. Inputs of calls that have not ended with their batch are copied
    and wait for a later one; that is at most what the calls open at one moment were given.
    """

    what: Inspection
    _host: HostStatistics = field(default_factory=HostStatistics)
    _run_bytes: int = 0
    _known: dict[tuple[str, int, str], Statistics] = field(default_factory=dict)
    _waiting: list[Part] = field(default_factory=list)

    def examine(self, batch: Batch) -> Inspected:
        """Look at a batch's tensors and decide on each."""
        parts = list(parts_of(batch))
        calls = [part.side.directory for part in parts if part.side.begins]
        return self._examine(batch.step, parts, calls, ended=False)

    def rest(self, step: int) -> Inspected:
        """What still waits when the step has ended, decided now."""
        examined = self._examine(step, [], [], ended=True)
        self._known.clear()
        return examined

    def _examine(self, step: int, parts: list[Part], calls: list[str], ended: bool) -> Inspected:
        parts += self._waiting
        findings = [[self._look(part, at) for at in range(len(part.specs))] for part in parts]
        suspicious = {
            part.call
            for part, seen in zip(parts, findings, strict=True)
            if any(each.nonfinite for each in seen)
        }
        over = {part.call for part in parts if part.side.direction == self._last}
        self._waiting, decided, values = [], [], {}
        for part, seen in zip(parts, findings, strict=True):
            inputs = part.side.direction == "inputs"
            sure = ended or part.call in over or part.call in suspicious or not inputs
            if self.what.only_nonfinite and not sure and any(spec.outcome is None for spec in part.specs):
                self._waiting.append(_kept(part))
                continue
            whole = inputs and part.call in suspicious
            pairs = zip(part.specs, seen, strict=True)
            part.specs = [self._decide(spec, each, whole) for spec, each in pairs]
            decided.append(part)
            texts = [text for each in seen if each.statistics for text in each.statistics.texts()]
            if texts:
                values[part.side.file] = texts
        return Inspected(batch_of(step, decided), calls, values)

    @property
    def _last(self) -> str:
        """The last that is captured of a call."""
        return "post_fwd_inputs" if self.what.post_inputs else "outputs"

    def _look(self, part: Part, at: int) -> _Finding:
        spec = part.specs[at]
        if spec.outcome is not None:
            return _NOTHING
        try:
            if not self.what.statistics:
                return _Finding(nonfinite=self._is_odd(part, at))
            found = self._statistics(part, at)
        except Exception as error:
            log.debug("a tensor could not be looked at", exc_info=True)
            # What cannot be judged is stored.
            return _Finding(nonfinite=True, error=f"statistics raised {type(error).__name__}")
        return _Finding(
            found, found.nonfinite > 0 and (not self.what.only_nonfinite or self._is_odd(part, at))
        )

    def _is_odd(self, part: Part, at: int) -> bool:
        """Whether a tensor is a reason to store its call: a mask's -inf among the arguments is none."""
        dtype, data = part.specs[at].shown[0], _shown(part, at)
        if part.side.direction not in ("inputs", "post_fwd_inputs"):
            return self._host.has_nonfinite(data, dtype)
        return self._host.has_nonfinite(data, dtype, besides_minus_infinity=True)

    def _statistics(self, part: Part, at: int) -> Statistics:
        spec = part.specs[at]
        chunk = part.chunks[at]
        if isinstance(chunk, Measured):
            vector = chunk.vector.view[chunk.vector_offset : chunk.vector_offset + _vector_bytes(spec)]
            return device_statistics.statistics(vector, prod(spec.shown[1]), *spec.shown)
        key = xxhash.xxh3_128_hexdigest(_view(part, at)), spec.kind, spec.original
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._host.statistics(_shown(part, at), *spec.shown)
        return found

    def _decide(self, spec: TensorSpec, seen: _Finding, whole: bool) -> TensorSpec:
        """The form of a tensor that was looked at; ``whole`` says that its call's inputs are all stored."""
        measured = seen.statistics is not None
        if spec.outcome is not None:
            return spec
        if not self.what.tensors:
            return spec.refused(STATISTICS_ONLY if measured else Outcome("failed", str(seen.error)), measured)
        if self.what.only_nonfinite and not (seen.nonfinite or whole):
            return spec.refused(FINITE, measured)
        limit = self.what.max_run_bytes
        if limit is not None and self._run_bytes + spec.nbytes > limit:
            self._run_bytes = limit
            return spec.refused(RUN_FULL, measured)
        self._run_bytes += spec.nbytes
        return spec.with_statistics() if measured else spec


def _bytes(part: Part, at: int) -> torch.Tensor:
    begin = part.offsets[at]
    return part.chunks[at].tensor[begin : begin + part.specs[at].nbytes]


def _shown(part: Part, at: int) -> torch.Tensor:
    """The bytes of a tensor as it is read."""
    spec, data = part.specs[at], _bytes(part, at)
    if not spec.is_scaled:
        return data
    return restored(data.view(torch.int8).view(spec.shape), spec.original).view(-1).view(torch.uint8)


def _view(part: Part, at: int) -> memoryview:
    begin = part.offsets[at]
    return part.chunks[at].view[begin : begin + part.specs[at].nbytes]


def _vector_bytes(spec: TensorSpec) -> int:
    return 8 * device_statistics.vector_numel(prod(spec.shown[1]) * spec.shown[0].itemsize)


def _kept(part: Part) -> Part:
    """The part with its bytes in memory of its own."""
    chunks, offsets = list(part.chunks), list(part.offsets)
    for at, spec in enumerate(part.specs):
        if spec.outcome is not None:
            continue
        chunk = chunks[at]
        chunks[at], offsets[at] = _copied(chunk, offsets[at], spec.nbytes)
        if isinstance(chunk, Measured):
            vector = _copied(chunk.vector, chunk.vector_offset, _vector_bytes(spec))
            chunks[at] = Measured(chunks[at], *vector)
    return Part(part.side, part.specs, chunks, offsets, part.scalars)


def _copied(chunk: Chunk, offset: int, nbytes: int) -> tuple[Chunk, int]:
    if isinstance(chunk, _Kept):
        return chunk, offset
    own = _Kept(max(1, nbytes))
    move_large(own.address, chunk.address + offset, nbytes)
    return own, 0
