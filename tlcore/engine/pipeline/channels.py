"""Running statistics for each channel, gathered on the pipeline's thread and kept in a file of the run.

What a step adds counts once the backend has accepted it; of one that fails nothing stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...layout import names
from ...layout.names import PathKey
from ...layout.structure import describe
from ...ledger import CHANNELS_ONLY, Outcome
from ...locations import is_url
from ...record import Json, RunInfo
from ...statistics.channel_file import ChannelTables, channel_file, encode
from ...statistics.channels import Table, add, empty
from ...statistics.channels_of_tensors import HostChannels, from_vector, vector_numel
from ...storage import Store
from ..batch import Batch, Measured, Part, batch_of, parts_of
from ..calls import CallSide
from ..filters.tensors import TensorSpec
from .inspector import Inspected

log = logging.getLogger("tlcore")
_MOST_SIDES = 1 << 14
# How long the file may lag behind on a disk of this machine, and at a URL.
_INTERVALS_S = (1.0, 5.0)
_OTHER_CHANNELS = Outcome("skipped", "another number of channels than before")


class _Named(NamedTuple):
    """A tensor by its logical name without the step, and what is said of it."""

    name: str
    path: tuple[PathKey, ...]


@dataclass(slots=True)
class _Gathered:
    """The values of one tensor, in all steps or in one."""

    table: Table
    about: Json


class Channels:
    """Takes batches' tensors into the statistics; used by one thread at a time.

    The file in ``store`` is written anew when a step is committed and ``interval_s`` seconds have passed
    since it was, and at the end.
    """

    def __init__(self, store: Store, rank: int, interval_s: float) -> None:
        self._store = store
        self._rank = rank
        self._interval_s = interval_s
        self._host = HostChannels()
        self._known: dict[Hashable, list[_Named]] = {}
        self._widths: dict[str, int] = {}
        self._open: dict[int, dict[str, _Gathered]] = {}
        self._all: dict[str, _Gathered] = {}
        self._steps = 0
        self._saved_at = float("-inf")
        self._is_saved = True

    def examine(self, batch: Batch) -> Inspected:
        """Add a batch's tensors to its step's statistics; none of them is stored."""
        parts = list(parts_of(batch))
        gathered = self._open.setdefault(batch.step, {})
        for part in parts:
            named = self._names(part.side, part.specs)
            part.specs = [self._look(part, at, named[at], gathered) for at in range(len(part.specs))]
        calls = [part.side.directory for part in parts if part.side.begins]
        return Inspected(batch_of(batch.step, parts), calls, {})

    def rest(self, step: int) -> Inspected:
        """Nothing waits for a step's end."""
        return Inspected(Batch(step), [], {})

    def commit(self, step: int) -> None:
        """Count what a step has added. Raises what the store raises where the file is due and refused."""
        for name, gathered in self._open.pop(step, {}).items():
            known = self._all.setdefault(name, _Gathered(empty(gathered.table.shape[1]), gathered.about))
            add(known.table, gathered.table)
        self._steps += 1
        self._is_saved = False
        if time.monotonic() - self._saved_at >= self._interval_s:
            self.save()

    def discard(self, step: int) -> None:
        """Forget what a step has added."""
        self._open.pop(step, None)

    def save(self) -> None:
        """Write the file, if there is news. Raises what the store raises."""
        if self._is_saved:
            return
        tables = {name: gathered.table for name, gathered in self._all.items()}
        about = {name: gathered.about for name, gathered in self._all.items()}
        # Before the store answers: one that refuses after long retries is not asked again for each step.
        self._saved_at = time.monotonic()
        self._store.put(channel_file(self._rank), [encode(ChannelTables(self._steps, tables, about))])
        self._is_saved, self._saved_at = True, time.monotonic()

    def _look(self, part: Part, at: int, named: _Named, gathered: dict[str, _Gathered]) -> TensorSpec:
        spec = part.specs[at]
        if spec.outcome is not None:
            return spec
        width = spec.shape[-1]
        if self._widths.setdefault(named.name, width) != width:
            return spec.refused(_OTHER_CHANNELS)
        try:
            table = self._table(part, at)
        except Exception as error:
            log.debug("a tensor could not be looked at", exc_info=True)
            return spec.refused(Outcome("failed", f"statistics raised {type(error).__name__}"))
        known = gathered.get(named.name)
        if known is None:
            gathered[named.name] = _Gathered(table, _about(part.side, spec, named))
        else:
            add(known.table, table)
        return spec.refused(CHANNELS_ONLY)

    def _table(self, part: Part, at: int) -> Table:
        spec, chunk, begin = part.specs[at], part.chunks[at], part.offsets[at]
        if isinstance(chunk, Measured):
            nbytes = 8 * vector_numel(spec.shape)
            vector = chunk.vector.view[chunk.vector_offset : chunk.vector_offset + nbytes]
            return from_vector(vector, spec.shape)
        return self._host.table(chunk.tensor[begin : begin + spec.nbytes], spec.dtype, spec.shape)

    def _names(self, side: CallSide, specs: Sequence[TensorSpec]) -> list[_Named]:
        """The names of a side's tensors, as they would be stored under."""
        key = (side, tuple(spec.device for spec in specs))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_SIDES:
                self._known.clear()
            found = self._known[key] = _named(side, specs, self._rank)
        return found


def gather_channels(run: RunInfo) -> Channels | None:
    """What gathers the statistics of a run that is being written; None for one without a store."""
    return None if run.store is None else Channels(run.store, run.rank, _INTERVALS_S[is_url(run.url)])


def _named(side: CallSide, specs: Sequence[TensorSpec], rank: int) -> list[_Named]:
    found: list[_Named] = []
    taken: set[str] = set()
    pending = iter(specs)

    def tensor(path: tuple[PathKey, ...]) -> Json:
        stem = names.unique(names.stem(side.direction, path, next(pending).device, rank), taken)
        found.append(_Named(f"{side.directory}/{stem}", path))
        return {}

    scalars: Any = iter([0] * side.scalars)
    describe(side.treespec, (), tensor, scalars)
    if side.keywords is not None:
        describe(side.keywords, (), tensor, scalars)
    return found


def _about(side: CallSide, spec: TensorSpec, named: _Named) -> Json:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"module": side.module, "direction": side.direction, "path": list(named.path), "dtype": dtype}
