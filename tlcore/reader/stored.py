"""What the reader has of a run: its source, asked with care. Every document and size is checked here.

A source may be a third party's, and what it reads may come from anybody: whatever it raises becomes a
ReadError, and whatever it returns is believed only as far as it makes sense.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from ..errors import ReadError, missing
from ..layout.names import rank_suffix, step_dir
from ..layout.row_scale import is_scaled, restored
from ..layout.run_files import RunFiles
from ..layout.templates import compact
from ..protocols import (
    Array,
    Buffer,
    ByteStream,
    Source,
    StepRanks,
    SupportsArrays,
    SupportsCheck,
    SupportsLedger,
    SupportsReadMany,
    SupportsRefresh,
    SupportsSizes,
    SupportsStreams,
    SupportsStructures,
    SupportsWholeChecks,
    WholeCheck,
)
from ..record import Json, tensor_from_bytes
from ..registry import open_source
from ..storage import Store
from .abilities import Abilities
from .documents import FOREIGN, check_step, check_structure
from .kept import Kept, Sound
from .sound_records import SoundRecords
from .sound_structures import SoundStructures
from .source_errors import tell
from .tensor_bytes import kind

if TYPE_CHECKING:
    import torch

_REMOTE_THREADS = 8


class Stored:
    """One run in a store; ``run`` is the content of its ``run.json``."""

    def __init__(self, store: Store, run: Json) -> None:
        self.store = store
        self.url = store.url
        self.files = RunFiles(store)
        self._run = run
        self._documents = Kept[Json]()
        self._kinds = Kept[Hashable | None]()
        self._sound, self.sound_records, self.known = Sound(), SoundRecords(), SoundStructures()
        self._structure_names = Kept[frozenset[str]]()

    @property
    def is_local(self) -> bool:
        """Whether the run lies on a disk of this machine."""
        return self.files.is_local

    @property
    def is_hashed(self) -> bool:
        """Whether records have hashes: those of a dump of another tool have none."""
        return self._run.get(FOREIGN) is not True

    @cached_property
    def source(self) -> Source:
        """The reader that the run's backend brings. Raises ReadError where there is none."""
        with self.asking():
            return open_source(self.store, self._run)

    @cached_property
    def can(self) -> Abilities:
        """What the source can do beside; that takes long to find out, and is asked for every tensor."""
        return Abilities(self.source, self.is_local)

    def refresh(self) -> None:
        """Look at the run anew; a source that cannot is made again."""
        self.files = RunFiles(self.store)
        source = self.__dict__.get("source")
        if source is not None and isinstance(source, SupportsRefresh):
            with self.asking():
                source.refresh()
        else:
            for name in ("source", "can"):
                self.__dict__.pop(name, None)

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """Each step of which something is there; one that is asked for alone may cost less than all."""
        with self.asking():
            return self.source.steps

    def step_ranks(self, step: int) -> StepRanks | None:
        """The ranks of one step; None where the run has nothing of it."""
        with self.asking():
            return self.source.steps.get(step)

    def numbers(self) -> list[int]:
        """The numbers of all steps, in order."""
        return [number for number, _ in self.all_ranks()]

    def all_ranks(self) -> list[tuple[int, StepRanks]]:
        """Each step's ranks, in order."""
        with self.asking():
            return sorted(self.source.steps.items(), key=itemgetter(0))

    def document(self, step: int, rank: int) -> Json:
        """What a rank has committed of a step, checked; the last few are kept.

        Raises ReadError when it is missing or damaged.
        """
        if (key := (step, rank)) not in self._documents:
            with self.asking():
                document = self.source.document(step, rank)
                kind = None if self.can.knowing is None else self.can.knowing.kind(step, rank)
            if not self._sound.has(kind):
                where = self._where(step, f"step{rank_suffix(rank)}.json")
                if not self.is_hashed:
                    # There is no such file in another tool's dump.
                    where = f"{self.url}, step {step}, rank {rank}"
                check_step(document, where, step, self.sound_records.problem)
                self._sound.add(kind)
            self._kinds.keep(key, kind)
            return self._documents.keep(key, document)
        return self._documents[key]

    def ledger(self, rank: int) -> Json | None:
        """A rank's ledger where the source knows it without opening the steps."""
        source = self.source
        if not isinstance(source, SupportsLedger):
            return None
        with self.asking():
            return source.ledger(rank)

    def structure_names(self, step: int, rank: int) -> Collection[str]:
        """``<call>/<direction>.json`` for each structure of a rank."""
        key = step, rank
        if key not in self._structure_names:
            source = self.source
            if isinstance(source, SupportsStructures):
                with self.asking():
                    names = frozenset(source.structure_names(step, rank))
            else:
                suffix = f"{rank_suffix(rank)}.json"
                packed = self._packed(step, rank)
                names = frozenset(
                    f"{name.removesuffix(suffix).removesuffix('.json')}.json" for name in packed
                )
            return self._structure_names.keep(key, names)
        return self._structure_names[key]

    def structure(self, step: int, rank: int, name: str) -> Json:
        """A tensor structure, checked. Raises MissingError or ReadError."""
        document = self.unchecked_structure(step, rank, name)
        kind = self._kinds.get((step, rank))
        if not self._sound.has(kind, name):
            ranked = f"{name.removesuffix('.json')}{rank_suffix(rank)}.json"
            check_structure(document, self._where(step, ranked))
            self._sound.add(kind, name)
        return document  # type: ignore[no-any-return]

    def unchecked_structure(self, step: int, rank: int, name: str) -> Any:
        """A tensor structure as it is stored, from anybody. Raises MissingError or ReadError."""
        ranked = f"{name.removesuffix('.json')}{rank_suffix(rank)}.json"
        source = self.can.structured
        if source is not None:
            with self.asking():
                document = source.structure(step, rank, name)
        else:
            packed = self._packed(step, rank)
            document = packed.get(ranked, packed.get(name))
            if document is None:
                raise missing("file", f"{step_dir(step)}/{ranked}", self.url, ())
        return document

    def structures(self, step: int, rank: int, names: Sequence[str]) -> list[Json]:
        """Tensor structures, checked, in order. Raises as `structure`."""
        if self.is_local or not isinstance(self.source, SupportsStructures):
            return self.known.documents(self.source, step, rank, names, self.structure)
        with ThreadPoolExecutor(_REMOTE_THREADS, "tlcore-read") as pool:
            return list(pool.map(lambda name: self.structure(step, rank, name), names))

    def structure_texts(self, step: int, rank: int, names: Sequence[str]) -> list[str]:
        """The same in one line each, as `tlcore.layout.templates.compact` has them."""
        if self.is_local or not isinstance(self.source, SupportsStructures):
            return self.known.texts(self.source, step, rank, names, self.structure)
        return list(map(compact, self.structures(step, rank, names)))

    def _packed(self, step: int, rank: int) -> Mapping[str, Any]:
        """The structures in a rank's document; none of a step that it has not committed."""
        known = self._documents.get((step, rank))
        if known is not None:
            return known.get("structures", {})  # type: ignore[no-any-return]
        ranks = self.step_ranks(step)
        if ranks is None or rank not in ranks.committed:
            return {}
        packed: Mapping[str, Any] = self.document(step, rank).get("structures", {})
        return packed

    def remains(self, step: int) -> Mapping[str, Json]:
        """The whole tensors that ranks left of a step without committing it, by logical name."""
        with self.asking():
            return self.source.remains(step)

    def read(self, record: Mapping[str, Any]) -> Buffer:
        """The bytes of a tensor. Raises MissingError or ReadError, also for too few or too many."""
        with self.asking():
            data = self.source.read(record)
        return self._whole(record, data)

    def read_many(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Buffer | ReadError]:
        """The bytes of several tensors in order, or why they cannot be read."""
        source = self.source
        if isinstance(source, SupportsReadMany):
            try:
                with self.asking():
                    found = source.read_many(records)
            except ReadError as error:
                return [error] * len(records)
            return [self._checked(record, each) for record, each in zip(records, found, strict=True)]
        return [self._read_or_error(record) for record in records]

    def _read_or_error(self, record: Mapping[str, Any]) -> Buffer | ReadError:
        try:
            return self.read(record)
        except ReadError as error:
            return error

    def _checked(self, record: Mapping[str, Any], found: Buffer | Exception) -> Buffer | ReadError:
        try:
            if isinstance(found, Exception):
                with self.asking():
                    raise found
            return self._whole(record, found)
        except ReadError as error:
            return error

    def _whole(self, record: Mapping[str, Any], data: Buffer) -> Buffer:
        size = memoryview(data).nbytes
        if size != record.get("bytes", size):
            where = f"{self.url}: {record['name']!r}"
            raise ReadError(f"{where}: {size} bytes, its record says {record['bytes']}")
        return data

    @property
    def has_arrays(self) -> bool:
        """Whether the same tensor of many steps lies in one piece."""
        return isinstance(self.source, SupportsArrays)

    def arrays(self, rank: int, keys: Collection[str] | None = None) -> Iterator[Array]:
        """A rank's arrays, as `SupportsArrays` has them; none from a source without them."""
        source = self.source
        if isinstance(source, SupportsArrays):
            with self.asking():
                yield from source.arrays(rank, keys)

    def read_array(self, array: Array, begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of rows ``[begin, end)`` of an array, all by default. Raises MissingError, ReadError."""
        source = self.source
        assert isinstance(source, SupportsArrays)
        with self.asking():
            return source.read_array(array, begin, end)

    def read_array_into(self, array: Array, begin: int, target: memoryview) -> Buffer | None:
        """The bytes from row ``begin`` on, as many as ``target`` takes and in it; None where it cannot be.

        Raises MissingError, ReadError.
        """
        source = self.can.reading_into
        if source is None:
            return None
        with self.asking():
            count = source.read_array_into(array, begin, target)
        return target if count == len(target) else target[:count]

    def map_array(self, array: Array) -> memoryview | None:
        """The bytes of an array for the system to copy from, if there are such. Raises as `read_array`."""
        with self.asking():
            return None if self.can.reading_into is None else self.can.reading_into.map_array(array)

    def tensor(self, record: Mapping[str, Any]) -> torch.Tensor:
        """The tensor of a record, on the CPU. Raises MissingError or ReadError."""
        where = f"{self.url}: {record['name']!r}"
        try:
            data = self._own_bytes(record)
            return tensor_from_bytes(data, *kind(record, where))
        except (ValueError, RuntimeError, OverflowError) as error:
            raise ReadError(f"{where}: ends too early or is damaged ({error})") from error
        except MemoryError:
            raise ReadError(f"{where}: larger than this machine's memory") from None

    def values(self, record: Mapping[str, Any], packed: bool = False) -> torch.Tensor:
        """What `tensor` gives; of rows with a scale what they stand for, unless ``packed``. Raises as it."""
        found = self.tensor(record)
        return restored(found, str(record["converted_from"])) if is_scaled(record) and not packed else found

    def _own_bytes(self, record: Mapping[str, Any]) -> Buffer:
        """A tensor's bytes in memory of its own, which may be written."""
        source = self.can.owning
        if source is None:
            return bytearray(self.read(record))
        # For each tensor; a context manager takes longer than asking.
        try:
            data = memoryview(source.own_bytes(record))
        except Exception as error:
            tell(error, self.url, self._run)
        self._whole(record, data)
        return bytearray(data) if data.readonly else data

    def stream(self, record: Mapping[str, Any]) -> ByteStream | None:
        """A tensor's bytes to be read piece by piece; None where ranged reads are as good."""
        source = self.source
        if not isinstance(source, SupportsStreams):
            return None
        with self.asking():
            return source.stream(record)

    def read_range(self, record: Mapping[str, Any], begin: int, end: int) -> Buffer:
        """The bytes ``[begin, end)`` of a tensor. Raises MissingError or ReadError."""
        with self.asking():
            return self.source.read(record, begin, end)

    def identity(self, record: Mapping[str, Any]) -> Hashable | None:
        """Equal for records that share stored bytes and mean the same by them; None if unknown."""
        source = self.can.identifying
        if source is None:
            return None
        with self.asking():
            return source.identity(record)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the record's bytes are there, as far as can be seen without reading them."""
        source = self.can.sizing
        if source is None:
            return True
        with self.asking():
            return source.holds(record)

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the size of what holds a record's bytes, in words."""
        source = self.can.sizing
        if source is None:
            return None
        with self.asking():
            return source.misfit(record)

    def advise(self, record: Mapping[str, Any]) -> None:
        """Have what holds a record's bytes fetched ahead; never raises."""
        with contextlib.suppress(ReadError):
            source = self.source
            if isinstance(source, SupportsSizes):
                with self.asking():
                    source.advise(record)

    def problems(self, step: int, rank: int, thorough: bool = True) -> Iterator[str]:
        """What is wrong with a rank's step beside its tensors, as the format itself can tell."""
        source = self.source
        if isinstance(source, SupportsCheck):
            try:
                with self.asking():
                    yield from source.problems(step, rank, self.document(step, rank), thorough)
            except ReadError as error:
                yield str(error)

    def whole_checks(self, rank: int) -> Generator[WholeCheck, None, None]:
        """Checks of many steps of a rank at once; none from a source without them. Never raises ReadError."""
        source = self.source
        if not isinstance(source, SupportsWholeChecks):
            return
        # What is wrong is found, and told, step by step.
        with contextlib.suppress(ReadError), self.asking():
            for check in source.whole_checks(rank):
                yield WholeCheck(check.alike, partial(self._unsound, check))

    def _unsound(self, check: WholeCheck) -> Collection[int]:
        try:
            with self.asking():
                return check.unsound()
        except ReadError:
            return [step for each in check.alike for step in each.steps]

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Around a call of a source: whatever comes out of it is a ReadError."""
        try:
            yield
        except Exception as error:
            tell(error, self.url, self._run)

    def _where(self, step: int, name: str) -> str:
        return f"{self.url}/{step_dir(step)}/{name}"
