"""What the model's thread hands to the pipeline: whole calls of a step, and the step's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..layout.drafts import Decided, accept
from ..layout.structure import Scalar
from ..layout.tokens import TOKENS, stored_entries
from ..ledger import Counts
from ..record import Json
from .calls import CallSide
from .filters.kept_rows import KeptRows
from .filters.tensors import TensorSpec
from .staging.host_memory import Chunk


class Measured(Chunk):
    """The chunk of a tensor whose statistics its own device has computed; it has none of its own memory.

    ``vector`` and ``vector_offset`` are the place of the statistics (`device_statistics`).
    """

    __slots__ = ("vector", "vector_offset")

    def __init__(self, chunk: Chunk, vector: Chunk, vector_offset: int) -> None:
        self.size, self.bytes = chunk.size, chunk.bytes
        self.tensor, self.view, self.address = chunk.tensor, chunk.view, chunk.address
        self.written = chunk.written
        self.vector = vector
        self.vector_offset = vector_offset


@dataclass(slots=True)
class Batch:
    """Whole sides of one step, in order, and the chunks (``memory``) that nobody needs after it.

    ``specs``, ``chunks`` and ``offsets`` have an item for each tensor of the sides, ``scalars`` one for
    each number or string. One that ``is_whole_step`` is all of its step, whose end follows at once. Of one
    that ``waits`` some tensors have rows that may have to go (`KeptRows`).
    """

    step: int
    sides: list[CallSide] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scalars: list[Scalar] = field(default_factory=list)
    memory: Sequence[Chunk] = ()
    is_whole_step: bool = False
    waits: bool = False

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was added to it."""
        return not (self.sides or self.specs or self.scalars or self.waits)


@dataclass(slots=True)
class StepEnd:
    """A step's end: everything that is not in its batches.

    ``started`` and ``ended`` are nanoseconds since 1970: the model does not wait for texts.
    ``decided`` says what became of the requests' draft tokens, and may wait for a device.
    ``unopened`` counts what was not looked into. ``tokens`` makes the entries of the requests' token ids.
    ``undecided`` are those of the ``rows`` and other row sets of which some may have to go then.
    """

    step: int
    started: int
    ended: int
    rows: Sequence[Json] | None
    extra: dict[str, Any]
    decided: Callable[[], Mapping[str, Decided]] | None = None
    unopened: Counts = field(default_factory=Counts)
    tokens: Callable[[], list[Json]] | None = None
    undecided: Sequence[KeptRows] = ()
    is_settled: bool = False

    def settle(self) -> None:
        """Note in the rows how many of them are of tokens that stayed in their requests, and the ids."""
        if self.is_settled:
            return
        self.is_settled = True
        entries = self._token_entries()
        decided = {} if self.decided is None else self.decided()
        accept([*(self.rows or ()), *entries], self.extra, decided)
        if entries:
            self.extra[TOKENS] = stored_entries(entries)

    def _token_entries(self) -> list[Json]:
        try:
            return [] if self.tokens is None else self.tokens()
        except Exception as error:
            # The step is worth more than what it was made from.
            self.extra["tokens_unavailable"] = str(error) or type(error).__name__
            return []


@dataclass(slots=True)
class Part:
    """One side of a batch with what belongs to it."""

    side: CallSide
    specs: list[TensorSpec]
    chunks: list[Chunk]
    offsets: list[int]
    scalars: list[Scalar]

    @property
    def call(self) -> tuple[str, int]:
        """Which call of which module the side belongs to."""
        return self.side.module, self.side.call


def parts_of(batch: Batch) -> Iterator[Part]:
    """The batch's sides, one by one."""
    place = scalar = 0
    for side in batch.sides:
        end, last = place + side.tensors, scalar + side.scalars
        yield Part(
            side,
            batch.specs[place:end],
            batch.chunks[place:end],
            batch.offsets[place:end],
            batch.scalars[scalar:last],
        )
        place, scalar = end, last


def batch_of(step: int, parts: Sequence[Part]) -> Batch:
    """A batch of these sides; the memory is left to whoever has it."""
    batch = Batch(step)
    for part in parts:
        batch.sides.append(part.side)
        batch.specs += part.specs
        batch.chunks += part.chunks
        batch.offsets += part.offsets
        batch.scalars += part.scalars
    return batch
