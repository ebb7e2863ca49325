"""Looking at staged tensors before they are stored: statistics, and whether a tensor is worth its bytes.

This runs on the pipeline's thread. What it decides it writes into the batch as other forms, so that names,
texts and the ledger follow from them as ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import xxhash

from . import device_statistics
from .batch import Batch, Measured, Part, batch_of, parts_of
from .forms import FINITE, RUN_FULL, STATISTICS_ONLY, Form, Outcome, move_large
from .host_memory import Chunk
from .host_statistics import HostStatistics
from .schema import Config
from .statistics import Statistics

log = logging.getLogger("tlcore")


@dataclass(frozen=True, slots=True)
class Examination:
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
    def of(cls, config: Config) -> Examination:
        """What a configuration asks for."""
        return cls(
            statistics=config.capture != "tensor",
            tensors=config.capture != "stats",
            only_nonfinite=config.on_condition == "nonfinite",
            max_run_bytes=config.max_run_bytes,
            post_inputs=config.log_post_fwd_inputs,
        )

    @property
    def needed(self) -> bool:
        """Whether anything is to be looked at."""
        return self.statistics or self.only_nonfinite


class Examined(NamedTuple):
    """A batch with the forms that were decided on.

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
class Examiner:
    """Examines the batches of one step after the other; used by one thread at a time.

    The condition holds for a whole call. Inputs of calls that have not ended with their batch are copied
    and wait for a later one; that is at most what the calls open at one moment were given.
    """

    what: Examination
    _host: HostStatistics = field(default_factory=HostStatistics)
    _run_bytes: int = 0
    _known: dict[tuple[str, int], Statistics] = field(default_factory=dict)
    _waiting: list[Part] = field(default_factory=list)

    def examine(self, batch: Batch) -> Examined:
        """Look at a batch's tensors and decide on each."""
        parts = list(parts_of(batch))
        calls = [part.site.directory for part in parts if part.site.direction == "inputs"]
        return self._examine(batch.step, parts, calls, ended=False)

    def rest(self, step: int) -> Examined:
        """What still waits when the step has ended, decided now."""
        examined = self._examine(step, [], [], ended=True)
        self._known.clear()
        return examined

    def _examine(self, step: int, parts: list[Part], calls: list[str], ended: bool) -> Examined:
        parts += self._waiting
        findings = [[self._look(part, at) for at in range(len(part.forms))] for part in parts]
        suspicious = {
            part.call
            for part, seen in zip(parts, findings, strict=True)
            if any(each.nonfinite for each in seen)
        }
        over = {part.call for part in parts if part.site.direction == self._last}
        self._waiting, decided, values = [], [], {}
        for part, seen in zip(parts, findings, strict=True):
            inputs = part.site.direction == "inputs"
            sure = ended or part.call in over or part.call in suspicious or not inputs
            if self.what.only_nonfinite and not sure and any(form.outcome is None for form in part.forms):
                self._waiting.append(_kept(part))
                continue
            whole = inputs and part.call in suspicious
            pairs = zip(part.forms, seen, strict=True)
            part.forms = [self._decide(form, each, whole) for form, each in pairs]
            decided.append(part)
            texts = [text for each in seen if each.statistics for text in each.statistics.texts()]
            if texts:
                values[part.site.file] = texts
        return Examined(batch_of(step, decided), calls, values)

    @property
    def _last(self) -> str:
        """The last that is captured of a call."""
        return "post_fwd_inputs" if self.what.post_inputs else "outputs"

    def _look(self, part: Part, at: int) -> _Finding:
        form = part.forms[at]
        if form.outcome is not None:
            return _NOTHING
        try:
            if not self.what.statistics:
                return _Finding(nonfinite=self._host.has_nonfinite(_bytes(part, at), form.dtype))
            found = self._statistics(part, at)
        except Exception as error:
            log.debug("a tensor could not be looked at", exc_info=True)
            # What cannot be judged is stored.
            return _Finding(nonfinite=True, error=f"statistics raised {type(error).__name__}")
        return _Finding(found, found.nonfinite > 0)

    def _statistics(self, part: Part, at: int) -> Statistics:
        form = part.forms[at]
        chunk = part.chunks[at]
        if isinstance(chunk, Measured):
            vector = chunk.vector.view[chunk.vector_offset : chunk.vector_offset + _vector_bytes(form)]
            numel = form.nbytes // form.dtype.itemsize
            return device_statistics.statistics(vector, numel, form.dtype, form.shape)
        data = _bytes(part, at)
        key = xxhash.xxh3_128_hexdigest(_view(part, at)), form.kind
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._host.statistics(data, form.dtype, form.shape)
        return found

    def _decide(self, form: Form, seen: _Finding, whole: bool) -> Form:
        """The form of a tensor that was looked at; ``whole`` says that its call's inputs are all stored."""
        measured = seen.statistics is not None
        if form.outcome is not None:
            return form
        if not self.what.tensors:
            return form.refused(STATISTICS_ONLY if measured else Outcome("failed", str(seen.error)), measured)
        if self.what.only_nonfinite and not (seen.nonfinite or whole):
            return form.refused(FINITE, measured)
        limit = self.what.max_run_bytes
        if limit is not None and self._run_bytes + form.nbytes > limit:
            self._run_bytes = limit
            return form.refused(RUN_FULL, measured)
        self._run_bytes += form.nbytes
        return form.with_statistics() if measured else form


def _bytes(part: Part, at: int) -> torch.Tensor:
    begin = part.offsets[at]
    return part.chunks[at].tensor[begin : begin + part.forms[at].nbytes]


def _view(part: Part, at: int) -> memoryview:
    begin = part.offsets[at]
    return part.chunks[at].view[begin : begin + part.forms[at].nbytes]


def _vector_bytes(form: Form) -> int:
    return 8 * device_statistics.vector_numel(form.nbytes // form.dtype.itemsize, form.nbytes)


def _kept(part: Part) -> Part:
    """The part with its bytes in memory of its own."""
    chunks, offsets = list(part.chunks), list(part.offsets)
    for at, form in enumerate(part.forms):
        if form.outcome is not None:
            continue
        chunk = chunks[at]
        chunks[at], offsets[at] = _copied(chunk, offsets[at], form.nbytes)
        if isinstance(chunk, Measured):
            vector = _copied(chunk.vector, chunk.vector_offset, _vector_bytes(form))
            chunks[at] = Measured(chunks[at], *vector)
    return Part(part.site, part.forms, chunks, offsets, part.scalars)


def _copied(chunk: Chunk, offset: int, nbytes: int) -> tuple[Chunk, int]:
    if isinstance(chunk, _Kept):
        return chunk, offset
    own = _Kept(max(1, nbytes))
    move_large(own.address, chunk.address + offset, nbytes)
    return own, 0
