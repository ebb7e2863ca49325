"""The ``safetensors`` backend: each step of a rank in a few large shards and one ``step.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlcore.names import step_dir
from tlcore.record import Json, Record, RunInfo, StepSummary

from .run_directory import RunDirectory
from .shards import Shard

SHARD_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record's bytes lie: ``[begin, end)`` in the payload of ``shard``."""

    shard: Shard
    begin: int
    end: int


class SafetensorsSink:
    """Writes ``step_<S>/shard_rank_<r>_<k>.safetensors``; its keys are the logical names.

    A shard is sealed when the next record would make its payload larger than ``shard_bytes``, and at
    the step's end. Structures are packed into ``step.json``. Identical tensors of a step are stored
    once. ``storage_options`` go to the fsspec filesystem when the run lies at a URL.
    """

    def __init__(
        self, shard_bytes: int = SHARD_BYTES, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self._shard_bytes = shard_bytes
        self._storage_options = storage_options

    def open(self, run: RunInfo) -> None:
        """Make the run's directory and, on rank 0, its ``run.json``.

        Raises BackendError when the directory cannot be made or written, or holds something else.
        """
        self._directory = RunDirectory(run, "safetensors", self._storage_options)
        self._rank = run.rank
        self._shard: Shard | None = None
        self._begin_step(None)
        self._directory.open()

    def write(self, batch: Sequence[Record]) -> None:
        """Append records of one step; one that repeats an earlier record only gets its name noted."""
        for record in batch:
            if record.step != self._step:
                self._begin_step(record.step)
            self._write_record(record)

    def commit_step(self, step: StepSummary) -> None:
        """Seal the last shard, then write the step's ``step.json``."""
        if step.step != self._step:
            self._begin_step(step.step)
        self._seal()
        document = step.to_json([_described(entry, place) for entry, place in self._entries])
        document["structures"] = {
            self._directory.ranked(name): structure for name, structure in step.structures.items()
        }
        document["shards"] = self._sealed
        self._directory.put_step(step.step, document)
        self._begin_step(None)

    def close(self) -> None:
        """Rank 0 marks ``run.json`` complete; every other rank leaves its own close marker."""
        self._begin_step(None)
        self._directory.close()

    def _begin_step(self, step: int | None) -> None:
        if self._shard is not None:
            self._shard.abandon()
        self._shard = None
        self._step = step
        self._sealed: list[Json] = []
        self._entries: list[tuple[Json, _Place]] = []
        self._places: dict[str, _Place] = {}

    def _write_record(self, record: Record) -> None:
        original = self._places.get(record.alias_of) if record.alias_of is not None else None
        if original is None and record.alias_of is not None:
            # Its original was not stored, so this record stands for itself.
            record = replace(record, alias_of=None)
        shard = self._shard_for(record)
        if original is None:
            place = _Place(shard, *shard.add(record))
        else:
            shard.add_alias(record)
            place = original
        self._places[record.name] = place
        self._entries.append((record.describe(), place))

    def _shard_for(self, record: Record) -> Shard:
        if self._shard is not None and not self._shard.has_room(record, self._shard_bytes):
            self._seal()
        if self._shard is None:
            index = len(self._sealed)
            name = f"{step_dir(record.step)}/shard_rank_{self._rank}_{index}.safetensors"
            self._shard = Shard(self._directory.store, name, index)
        return self._shard

    def _seal(self) -> None:
        if self._shard is not None:
            size = self._shard.seal()
            self._sealed.append({"file": self._shard.name, "bytes": size})
            self._shard = None


def _described(entry: Json, place: _Place) -> Json:
    begin = place.shard.data_begin
    return {**entry, "shard": place.shard.name, "offsets": [begin + place.begin, begin + place.end]}
