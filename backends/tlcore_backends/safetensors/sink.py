"""The ``safetensors`` backend: each step of a rank in a few large shards and one ``step.json``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tlcore.layout.checksums import with_checksum
from tlcore.layout.names import rank_suffix, step_dir
from tlcore.layout.templates import compact, structures_of
from tlcore.record import Json, Record, RunInfo, StepSummary
from tlcore.storage import SupportsFiles

from ..storage.run_store import store_of
from ..storage.uploads import AtOnce, Uploads
from .shard import Shard
from .shard_buffer import ShardBuffers

SHARD_BYTES = 512 << 20
# A shard, and where a tensor begins and ends in its payload.
_Place = tuple[Shard, int, int]


class SafetensorsSink:
    """Writes ``step_<S>/shard_rank_<r>_<k>.safetensors``; its keys are the logical names.

    A shard is sealed when the next record would make its payload larger than ``shard_bytes``, and at
    the step's end. Structures are packed into ``step.json``. Identical tensors of a step are stored
    once.
    """

    def __init__(self, shard_bytes: int = SHARD_BYTES) -> None:
        self._shard_bytes = shard_bytes

    def open(self, run: RunInfo) -> None:
        """Begin to write into ``run.store``."""
        self._store = store_of(run)
        self._suffix = rank_suffix(run.rank)
        # A place that answers at once needs no threads.
        self._uploads = AtOnce() if isinstance(self._store, SupportsFiles) else Uploads(self._store)
        self._memory = ShardBuffers()
        self._rank = run.rank
        self._shard: Shard | None = None
        self._begin_step(None)

    def write(self, batch: Sequence[Record]) -> None:
        """Append records of one step; one that repeats an earlier record only gets its name noted."""
        for record in batch:
            if record.step != self._step:
                self._begin_step(record.step)
            self._write_record(record)
        if self._shard is not None:
            self._shard.flush()

    def commit_step(self, step: StepSummary) -> None:
        """Seal the last shard, then write the step's ``step.json``."""
        if step.step != self._step:
            self._begin_step(step.step)
        self._seal()
        self._uploads.wait()
        structures = structures_of(step_dir(step.step), step.structures)
        more = {"structures": structures.packed(self._suffix), "shards": compact(self._sealed)}
        text = with_checksum(step.to_text(self._entry_texts(), more))
        self._store.put(f"{step_dir(step.step)}/step{self._suffix}.json", [text])
        self._begin_step(None)

    def close(self) -> None:
        """Forget a step that was not committed, end the threads, give the memory back."""
        self._begin_step(None)
        self._uploads.close()
        self._memory.clear()

    def _begin_step(self, step: int | None) -> None:
        if self._shard is not None:
            self._shard.abandon()
        # Left of a step that failed; that is why nobody wants them.
        with contextlib.suppress(Exception):
            self._uploads.wait()
        self._shard = None
        self._step = step
        self._sealed: list[Json] = []
        # What goes into step.json once it is known where each shard's payload begins: each record's text,
        # and its shard and place in the payload. Aliases share these, which leaves few objects to be traced.
        self._entries: list[str] = []
        self._places: list[_Place] = []
        self._by_name: dict[str, _Place] = {}

    def _write_record(self, record: Record) -> None:
        place = self._by_name.get(record.alias_of) if record.alias_of is not None else None
        if place is None:
            if record.alias_of is not None:
                # Its original was not stored, so this record stands for itself.
                record = record._replace(alias_of=None)
            place = self._append(record)
        else:
            self._note_alias(record)
        self._by_name[record.name] = place
        self._entries.append(record.entry_text())
        self._places.append(place)

    def _append(self, record: Record) -> _Place:
        shard = self._shard or self._open_shard(record.step)
        begin = shard.add(record)
        if begin is None:
            self._seal()
            shard = self._open_shard(record.step)
            begin = shard.add(record)
            assert begin is not None, "an empty shard takes any record"
        return shard, begin, begin + record.data.nbytes

    def _note_alias(self, record: Record) -> None:
        shard = self._shard or self._open_shard(record.step)
        if not shard.add_alias(record):
            self._seal()
            self._open_shard(record.step).add_alias(record)

    def _entry_texts(self) -> Iterator[str]:
        for entry, (shard, begin, end) in zip(self._entries, self._places, strict=True):
            data_begin = shard.data_begin
            yield f'{entry},"shard":{shard.quoted_name},"offsets":[{data_begin + begin},{data_begin + end}]}}'

    def _open_shard(self, step: int) -> Shard:
        index = len(self._sealed)
        name = f"{step_dir(step)}/shard_rank_{self._rank}_{index}.safetensors"
        self._shard = Shard(self._store, name, index, self._shard_bytes, self._memory)
        return self._shard

    def _seal(self) -> None:
        if self._shard is None:
            return
        # One shard travels while the next is put together; more would take more memory.
        self._uploads.wait()
        self._sealed.append(self._shard.seal(self._uploads.run).to_json())
        self._shard = None
