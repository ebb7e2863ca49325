"""Reading shards: each tensor a range of a safetensors file, everything else in ``step.json``."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

from tlcore.errors import ReadError
from tlcore.layout.checks import is_whole
from tlcore.layout.names import step_dir
from tlcore.layout.run_files import FileStream, RunFiles
from tlcore.protocols import Buffer, StepRanks
from tlcore.record import Json
from tlcore.storage import Store

from ..storage.step_files import StepFiles
from .check import overlapping, shard_problems
from .remains import records_in_shards
from .slices import Slice

_Range = tuple[str, int, int]


class SafetensorsSource:
    """Reads a run that `SafetensorsSink` wrote."""

    def __init__(self, store: Store, run: Json) -> None:
        self._files = RunFiles(store)
        self._steps = StepFiles(self._files, run)
        # What the documents that were read say of their shards' sizes.
        self._stated: dict[str, int] = {}

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """The steps that have a directory, with the ranks whose ``step.json`` is there."""
        return self._steps

    def document(self, step: int, rank: int) -> Json:
        """A rank's ``step.json``, in which the structures are packed."""
        document: Json = self._steps.document(step, rank)
        shards = document.get("shards") if isinstance(document, dict) else None
        for shard in shards if isinstance(shards, list) else ():
            if isinstance(shard, dict) and is_whole(shard.get("bytes")) and "file" in shard:
                self._stated[str(shard["file"])] = shard["bytes"]
        return document

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of a tensor, by one ranged read from its shard."""
        where = self._where(record)
        place = Slice.of(record, where)
        size = self._files.size(place.shard)
        if size is not None and place.end > size:
            raise ReadError(f"{where}: {place.shard} ends too early, it has {size} bytes")
        last = place.end if end is None else min(place.end, place.begin + end)
        data = self._files.read(place.shard, place.begin + begin, last)
        if len(data) < last - place.begin - begin:
            raise ReadError(f"{where}: {place.shard} ends too early or is damaged ({len(data)} bytes read)")
        return data

    def read_many(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Buffer | Exception]:
        """The bytes of several tensors: ranges that touch are read as one."""
        ranges = [_range(record) for record in records]
        known = self._read_ranges({each for each in ranges if each is not None})
        found: list[Buffer | Exception] = []
        for record, place in zip(records, ranges, strict=True):
            data = None if place is None else known.get(place)
            try:
                # Where it could not be read with others, reading it alone says what is wrong.
                found.append(self.read(record) if data is None else data)
            except ReadError as error:
                found.append(error)
        return found

    def identity(self, record: Mapping[str, Any]) -> Hashable | None:
        """Equal for records of one range of a shard."""
        return _range(record)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard is there in its size."""
        shard = str(record.get("shard"))
        stated = self._stated.get(shard)
        return stated is not None and self._files.size(shard) == stated

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with a shard is told once, by `problems`."""
        return None

    def advise(self, record: Mapping[str, Any]) -> None:
        """Have the system fetch the range."""
        place = _range(record)
        if place is not None:
            self._files.advise(*place)

    def stream(self, record: Mapping[str, Any]) -> FileStream | None:
        """The bytes of a tensor in a local shard; elsewhere ranged reads are as good."""
        place = Slice.of(record, self._where(record))
        size, stated = self._files.size(place.shard), self._stated.get(place.shard)
        if None not in (size, stated) and size != stated:
            raise ReadError(f"{self._files.url}/{place.shard}: {size} bytes, step.json says {stated}")
        file = self._files.open(place.shard)
        return None if file is None else FileStream(file, place.begin)

    def remains(self, step: int) -> Mapping[str, Json]:
        """The tensors of a step's sealed shards."""
        return records_in_shards(self._files, step_dir(step))

    @property
    def unchecked(self) -> Collection[str]:
        """The ``step.json`` read so far that have no checksum."""
        return self._steps.unchecked

    def problems(self, step: int, rank: int, document: Json, thorough: bool = True) -> Iterator[str]:
        """What is wrong with the sizes and headers of shards, and tensors that claim the same bytes."""
        if thorough:
            yield from shard_problems(self._files, document)
        elif (overlap := overlapping(document)) is not None:
            yield overlap

    def close(self) -> None:
        """Nothing is held open."""

    def _where(self, record: Mapping[str, Any]) -> str:
        return f"{self._files.url}: {record.get('name')!r}"

    def _read_ranges(self, ranges: set[_Range]) -> dict[_Range, memoryview]:
        """The bytes of ranges; those that cannot be read are left out."""
        found: dict[_Range, memoryview] = {}
        for run in _touching(sorted(ranges)):
            shard, begin, end = run[0][0], run[0][1], run[-1][2]
            try:
                if end > (self._files.size(shard) or 0):
                    continue
                data = memoryview(self._files.read(shard, begin, end))
            except ReadError:
                continue
            if len(data) == end - begin:
                found.update((each, data[each[1] - begin : each[2] - begin]) for each in run)
        return found


def _range(record: Mapping[str, Any]) -> _Range | None:
    """Where a record's bytes lie in a shard; None when the record makes no sense."""
    try:
        place = Slice.of(record, "")
    except ReadError:
        return None
    return place.shard, place.begin, place.end


def _touching(ranges: Sequence[_Range]) -> Iterator[list[_Range]]:
    run: list[_Range] = []
    for each in ranges:
        if run and (each[0] != run[-1][0] or each[1] != run[-1][2]):
            yield run
            run = []
        run.append(each)
    if run:
        yield run
