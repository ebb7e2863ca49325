"""The contracts of a backend: a `Sink` writes a format, a `Source` reads it, both over a `Store`.

An author of a backend needs nothing but this module, `tlcore.record` and `tlcore.errors`. The contracts of
stores (`tlcore.storage`), of steps that are alike (`tlcore.alike`) and of checks (`tlcore.checking`) can be
had here too. What a sink or source can do beyond its protocol it says by having the methods of one named
``Supports...``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .alike import AlikeStep as AlikeStep
from .alike import Outline as Outline
from .alike import RecordKind as RecordKind
from .alike import StepKinds as StepKinds
from .alike import StructureKind as StructureKind
from .alike import SupportsAlikeInCapture as SupportsAlikeInCapture
from .alike import SupportsAlikeSteps as SupportsAlikeSteps
from .alike import SupportsAlikeTensors as SupportsAlikeTensors
from .alike import SupportsOutlines as SupportsOutlines
from .alike import SupportsStepKinds as SupportsStepKinds
from .alike import SupportsWriteAlike as SupportsWriteAlike
from .checking import AlikeSteps as AlikeSteps
from .checking import SupportsCheck as SupportsCheck
from .checking import SupportsMoveSound as SupportsMoveSound
from .checking import SupportsReadSound as SupportsReadSound
from .checking import SupportsUnchecked as SupportsUnchecked
from .checking import SupportsWholeChecks as SupportsWholeChecks
from .checking import WholeCheck as WholeCheck
from .record import Json, Record, RunInfo, StepSummary
from .storage import Appending as Appending
from .storage import Buffer as Buffer
from .storage import Entry as Entry
from .storage import Level as Level
from .storage import Location as Location
from .storage import RetryPolicy as RetryPolicy
from .storage import Store as Store
from .storage import SupportsAppend as SupportsAppend
from .storage import SupportsFiles as SupportsFiles
from .storage import SupportsLevels as SupportsLevels
from .storage import SupportsNames as SupportsNames
from .storage import SupportsOverwrite as SupportsOverwrite
from .storage import SupportsPrepare as SupportsPrepare
from .storage import SupportsRemoval as SupportsRemoval
from .storage import SupportsUsage as SupportsUsage
from .storage import SupportsWaiting as SupportsWaiting


@runtime_checkable
class Sink(Protocol):
    """Turns records into something durable. Made by ``factory(**options)``, used by one thread at a time.

    The order of calls:

    1. The engine opens the run's store and writes ``run.json`` into it (rank 0; a place that cannot be
       written is found out here). `open` follows.
    2. For each step any number of `write`, then one `commit_step`. A step that fails is abandoned: no
       `commit_step` follows, and the next `write` belongs to a later step.
    3. `close`. Then the engine writes the end mark (rank 0 into ``run.json``, any other rank
       ``close_rank_<r>.json``) and closes the store.

    An exception from any call but `open` is booked in the ledger and never reaches the model.
    """

    def open(self, run: RunInfo) -> None:
        """Prepare for the run. ``run.store`` is its directory or URL, opened, for a sink that wants it.

        Raises BackendError when the place cannot be written.
        """
        ...

    def write(self, batch: Sequence[Record]) -> None:
        """Take over records of one step; their ``data`` is invalid once this returns."""
        ...

    def commit_step(self, step: StepSummary) -> None:
        """Accept the step, which is then read back whole; durable now unless it `SupportsLateCommit`."""
        ...

    def close(self) -> None:
        """Finish; ``run.ledger`` is final. What is not committed is gone. ``run.store`` stays open."""
        ...


StepStored = Callable[[int, BaseException | None], None]


@runtime_checkable
class SupportsLateCommit(Protocol):
    """A sink that makes many steps durable together: its `commit_step` returns when a step is accepted.

    The ledger counts such a step as stored, or as failed, when the sink says so. A sink without these
    methods has made each step durable when `commit_step` returns.
    """

    def tell_stored(self, stored: StepStored) -> None:
        """Called once, before the first `Sink.write`.

        ``stored(step, error)`` is to be called for each step that was accepted, in any thread: with None
        once it is durable, else with what prevented it; for all of them before `Sink.close` returns.
        """
        ...

    def flush(self) -> None:
        """Return when every step accepted so far is durable or has failed."""
        ...


class Lease(Protocol):
    """Memory that is lent beyond one call."""

    def end(self, clean: bool = True) -> None:
        """Give it back; not ``clean`` while somebody may still read it, who then has it for good."""
        ...


@runtime_checkable
class SupportsLentMemory(Protocol):
    """A sink that, once open, may keep the memory of large records (``keeps_memory``) and not copy it."""

    keeps_memory: bool

    def write_lent(self, batch: Sequence[Record], lease: Lease) -> bool:
        """As `Sink.write`; where it returns True the records' ``data`` stays until ``lease`` is ended.

        That may be in any thread, and not every batch of a step need come so. After False or an exception
        the caller ends it.
        """
        ...


@runtime_checkable
class SupportsLayouts(Protocol):
    """A sink of a format that has several layouts: which one it writes, as ``run.json`` then says."""

    layout: int


class StepRanks(NamedTuple):
    """The ranks that have committed a step, and those that have left something of it uncommitted."""

    committed: frozenset[int]
    begun: frozenset[int] = frozenset()


@runtime_checkable
class Source(Protocol):
    """Reads back what the sink of the same backend wrote. Made by ``factory(store, run)``.

    ``store`` is the run's directory or URL and ``run`` the content of its ``run.json``. Making it is cheap:
    nothing but what a first look needs is read. It shows the run as it was when it was first looked at
    (`SupportsRefresh` looks anew). Called from several threads at once.

    A run may come from anybody. The reader checks every document and record that it is given before it
    uses them; a source checks what it uses itself (places, offsets, sizes). It raises ReadError, or
    `MissingError` for what is not there, and says where.
    """

    @property
    def steps(self) -> Mapping[int, StepRanks]:
        """Each step of which something is there. May be a lazy mapping: one step is often asked for alone."""
        ...

    def document(self, step: int, rank: int) -> Json:
        """What a rank has committed: the document of `StepSummary.to_json`, with all its records.

        Each record has the keys of `Record.describe`, and any further ones by which `read` finds its
        bytes. The structures stand under ``structures`` by name (`StepSummary.structures`), unless the
        source `SupportsStructures`.
        """
        ...

    def read(self, record: Mapping[str, Any], begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes ``[begin, end)`` of a tensor, C-contiguous and little-endian; all of them by default.

        ``record`` is one of `document` (checked: name, dtype, shape, bytes) or of `remains`.
        """
        ...

    def remains(self, step: int) -> Mapping[str, Json]:
        """The whole tensors, by logical name, that ranks left of a step without committing it.

        Each is a record with at least ``name``, ``dtype`` and ``shape``; a lazy mapping may find them out
        when asked. Names that a committed rank lists too are left to the reader. Empty where nothing is left.
        """
        ...

    def close(self) -> None:
        """Release handles; ``store`` is its owner's."""
        ...


@runtime_checkable
class SupportsStructures(Protocol):
    """A source that keeps structures beside the step's document, and reads each when it is asked for."""

    def structure_names(self, step: int, rank: int) -> Collection[str]:
        """``<call>/<direction>.json`` (`layout.directions`) for each one, also of an uncommitted step."""
        ...

    def structure(self, step: int, rank: int, name: str) -> Any:
        """One of these documents. Raises MissingError or ReadError."""
        ...


@runtime_checkable
class SupportsReadMany(Protocol):
    """A source that reads many tensors faster together than one by one (ranges that touch, one request)."""

    def read_many(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Buffer | Exception]:
        """The bytes of each record in order, or why they cannot be read (ReadError); does not raise.

        The records may be of several steps and ranks. Called with about 8 MiB at a time, by several threads.
        """
        ...


@runtime_checkable
class SupportsIdentity(Protocol):
    """A source that knows which records share stored bytes, so that these are read and hashed once."""

    def identity(self, record: Mapping[str, Any]) -> Hashable | None:
        """Equal for records whose tensor is the very same stored bytes; None where that is not known."""
        ...


@runtime_checkable
class SupportsSizes(Protocol):
    """A source that can tell without reading it whether a tensor is there."""

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the record's bytes are there, in the size that its document says."""
        ...

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the size of the file that holds just this record, if anything is."""
        ...

    def advise(self, record: Mapping[str, Any]) -> None:
        """The record's bytes will be read soon. Never raises."""
        ...


class ByteStream(Protocol):
    """The bytes of one tensor, read in any order."""

    def readinto(self, begin: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from ``begin`` on; returns how many there were. Raises ReadError."""
        ...

    def close(self) -> None:
        """Release the handle."""
        ...


@runtime_checkable
class SupportsStreams(Protocol):
    """A source that can read a tensor piece by piece at less cost than one `Source.read` for each."""

    def stream(self, record: Mapping[str, Any]) -> ByteStream:
        """Open a record's bytes. Raises MissingError or ReadError, also when they are fewer than it says."""
        ...


@runtime_checkable
class SupportsOwnBytes(Protocol):
    """A source that reads a tensor into memory which nobody else has."""

    def own_bytes(self, record: Mapping[str, Any]) -> Buffer:
        """As `Source.read`; where the bytes can be written, they are the caller's from now on."""
        ...


@runtime_checkable
class SupportsRefresh(Protocol):
    """A source that can look again at a run that is still written."""

    def refresh(self) -> None:
        """See what was committed since; what was seen before stays."""
        ...


@runtime_checkable
class SupportsLedger(Protocol):
    """A source that knows a rank's ledger without opening its steps."""

    def ledger(self, rank: int) -> Json | None:
        """The ledger of all that a rank has committed, as `Counts.to_json` gives it; None if not known."""
        ...


@runtime_checkable
class SupportsFileTree(Protocol):
    """A source whose run lies there as the documented tree of files already (the ``pt`` backend)."""

    def tree(self) -> Mapping[str, int]:
        """Every file of the run and its size in bytes."""
        ...

    def file(self, name: str) -> bytes:
        """The bytes of a file. Raises MissingError or ReadError."""
        ...


class ArrayRows(NamedTuple):
    """What one step has of a whole array: the rows ``[begin, end)``, of which ``record`` is the tensor."""

    step: int
    begin: int
    end: int
    record: Json


class Array(NamedTuple):
    """One captured tensor over many steps, as one array: its rows in the order of the steps.

    ``key`` is the logical name without the step (``layers.0/outputs_cpu``). ``shape`` is that of the whole
    array; a step's tensor is ``rows`` of it (one row for a 0-d tensor, whose shape is then the rest).
    """

    key: str
    rank: int
    dtype: str
    shape: tuple[int, ...]
    rows: Sequence[ArrayRows]


@runtime_checkable
class SupportsArrays(Protocol):
    """A source in whose format the same tensor of many steps lies in one piece."""

    def arrays(self, rank: int, keys: Collection[str] | None = None) -> Iterator[Array]:
        """The arrays of a rank in the order of the steps (several for one key where its form changed)."""
        ...

    def read_array(self, array: Array, begin: int = 0, end: int | None = None) -> Buffer:
        """The bytes of rows ``[begin, end)`` of an array."""
        ...


@runtime_checkable
class SupportsArraysInto(SupportsArrays, Protocol):
    """One that reads an array's rows into memory that is there already: new memory costs as much again."""

    def read_array_into(self, array: Array, begin: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from row ``begin`` on; returns how many there were."""
        ...

    def map_array(self, array: Array) -> memoryview | None:
        """A map of the array's bytes, for the system alone to copy from; None where there is none."""
        ...


@runtime_checkable
class SupportsKinds(Protocol):
    """A source that knows which steps' documents are alike, so that one of them is checked for all."""

    def kind(self, step: int, rank: int) -> Hashable | None:
        """Equal for steps whose documents are sound if that of one of them is; None where it is not known."""
        ...


@runtime_checkable
class SupportsStructureTexts(Protocol):
    """A source that reads many structures at once, so that those that are alike are checked once."""

    def structure_texts(self, step: int, rank: int, names: Sequence[str]) -> Sequence[bytes | None]:
        """The JSON of structures as it is stored; None for one that must be asked for by itself."""
        ...


SinkFactory = Callable[..., Sink]
SourceFactory = Callable[[Store, Json], Source]
LocationOf = Callable[[Mapping[str, Any], str], Location | str]


@dataclass(frozen=True, slots=True)
class Backend:
    """A format: how it is written, how it is read, and where its runs' documents lie.

    ``sink(**options)`` makes a `Sink`; ``source(store, run)`` a `Source` (without it runs can be listed
    but not read). ``location(options, output_dir)`` says in which directory or at which URL runs lie, by
    default in ``output_dir``. ``options_schema`` is the JSON Schema of the options; None accepts any.
    """

    sink: SinkFactory
    source: SourceFactory | None = None
    location: LocationOf | None = None
    options_schema: Mapping[str, Any] | None = None
