"""What flows from the hooks to a sink: records, step summaries, the run, and the ledger."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .layout.dtypes import name_of
from .layout.hashes import HASH_PREFIX
from .layout.names import PathKey
from .layout.row_scale import KEY, SCALE, STORED
from .layout.templates import Json as Json
from .layout.templates import compact, quoted
from .ledger import Counts, Ledger
from .locations import redact_url
from .storage import Store

if TYPE_CHECKING:
    import numpy as np
    import torch

LAYOUT_VERSION = 1
# Of a run as a whole; its steps' documents are the same in both.
NEWEST_LAYOUT = 2
# One of `layout.directions`.
Direction = str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor comes from and what it looks like: all of a record that repeats from step to step.

    ``placements`` is JSON text on how a rank's part belongs to a distributed tensor. ``original`` is the
    dtype that it had, where it was converted. ``kind`` is another origin that differs in rows alone, where
    one is known.
    """

    rank: int
    module: str
    call: int
    direction: Direction
    path: tuple[PathKey, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    placements: str = ""
    original: str = ""
    kind: Origin | None = field(default=None, repr=False, compare=False)
    _text: str = field(default="", init=False, repr=False, compare=False)

    @property
    def text(self) -> str:
        """Its part of the record's entry in ``step.json``."""
        if not self._text:
            object.__setattr__(self, "_text", compact(self.describe())[1:-1])
        return self._text

    def with_shape(self, shape: tuple[int, ...]) -> Origin:
        """The origin of a tensor that has other rows and is alike else."""
        where = self.rank, self.module, self.call, self.direction, self.path
        form = self.dtype, shape, self.device, self.placements, self.original
        return Origin(*where, *form, self.kind or self)

    def describe(self) -> Json:
        """The origin's keys in ``step.json``."""
        part = {"placements": json.loads(self.placements)} if self.placements else {}
        if self.original:
            part |= conversion_of(self.dtype, self.original)
        return {
            "module": self.module,
            "call": self.call,
            "direction": self.direction,
            "path": list(self.path),
            "dtype": name_of(self.dtype),
            "shape": list(self.shape),
            "device": self.device,
            "bytes": math.prod(self.shape) * self.dtype.itemsize,
            **part,
        }


def conversion_of(dtype: torch.dtype, original: str) -> Json:
    """What records and structures say of a tensor that had the ``original`` dtype and is stored otherwise."""
    said: Json = {"converted_from": original}
    return said | {KEY: SCALE} if name_of(dtype) == STORED else said


class Record(NamedTuple):
    """One captured tensor: its logical name, where it came from, and its bytes.

    ``data`` is the C-contiguous little-endian payload and belongs to the pipeline: it is valid until
    the `Sink.write` that received it returns. ``hash`` is the xxh3-128 of the payload, in hex.
    ``alias_of`` names an earlier record of the same step with the same dtype, shape and bytes.
    """

    name: str
    step: int
    origin: Origin
    data: memoryview
    hash: str
    alias_of: str | None = None

    @property
    def rank(self) -> int:
        """The rank that captured it."""
        return self.origin.rank

    @property
    def module(self) -> str:
        """The module's dotted name."""
        return self.origin.module

    @property
    def call(self) -> int:
        """Which call of the module in the step, counted from 0."""
        return self.origin.call

    @property
    def direction(self) -> Direction:
        """Inputs, outputs, inputs as they stood after the call, or a tap (`layout.directions`)."""
        return self.origin.direction

    @property
    def path(self) -> tuple[PathKey, ...]:
        """Positions and keys that lead to the tensor in the call's arguments or result."""
        return self.origin.path

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.origin.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.origin.shape

    @property
    def device(self) -> str:
        """The torch device string, such as ``cuda:0``."""
        return self.origin.device

    @property
    def nbytes(self) -> int:
        """Payload size in bytes."""
        return self.data.nbytes

    def tensor(self) -> torch.Tensor:
        """A CPU tensor over ``data`` (no copy; clone it to keep it past the write)."""
        return tensor_from_bytes(self.data, self.dtype, self.shape)

    def describe(self) -> Json:
        """The record's entry in ``step.json``, without the place where its bytes lie."""
        entry: Json = {"name": self.name, **self.origin.describe(), "hash": f"{HASH_PREFIX}{self.hash}"}
        if self.alias_of is not None:
            entry["alias_of"] = self.alias_of
        return entry

    def entry_text(self) -> str:
        """`describe` as JSON text without its closing brace: the keys of its place are still to follow."""
        alias = "" if self.alias_of is None else f',"alias_of":{quoted(self.alias_of)}'
        return f'{{"name":{quoted(self.name)},{self.origin.text},"hash":"{HASH_PREFIX}{self.hash}"{alias}'


def tensor_from_bytes(
    data: memoryview | bytes | bytearray, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """A CPU tensor of ``dtype`` and ``shape`` over contiguous ``data``, without a copy.

    Raises ValueError when the sizes disagree.
    """
    import torch

    shape, view = tuple(shape), memoryview(data)
    count = math.prod(shape)
    if count * dtype.itemsize != view.nbytes:
        raise ValueError(f"{view.nbytes} bytes do not make a {dtype} tensor of shape {shape}")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    kind = None if view.readonly else _numpy_kind(dtype)
    if kind is None:
        return torch.frombuffer(data, dtype=dtype).view(shape)
    import numpy as np

    # Two calls of torch's take three times as long.
    return torch.from_numpy(np.ndarray(shape, kind, data))


@lru_cache(256)
def _numpy_kind(dtype: torch.dtype) -> np.dtype[Any] | None:
    """numpy's dtype of the same values; None where it has none."""
    import torch

    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


@dataclass(frozen=True, slots=True)
class SpillLocation:
    """A local ``directory`` for what the run's own place does not take within ``patience_s`` seconds."""

    directory: str
    patience_s: float


def writer_is_running(document: Mapping[str, Any]) -> bool | None:
    """Whether the process named by ``host`` and ``pid`` runs; None where this machine cannot tell."""
    pid = document.get("pid")
    if document.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return None
    return is_running(pid)


def is_running(process: int) -> bool:
    """Whether there is a process of this machine with this number, and it has not ended."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # It is somebody else's.
        pass
    # One that has ended keeps its number until somebody asks after it, as in a container without an init.
    return state_of(process) != "Z"


def state_of(process: int) -> str:
    """How the system calls what a process does, ``"Z"`` where it has ended; empty where nobody says."""
    try:
        with open(f"/proc/{process}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _hold_nothing(nbytes: int) -> None:
    """What a sink tells where no queue is before it."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink learns when it is opened.

    ``url`` is the run's own directory (``<output_dir>/<run id>``), a local path or an fsspec URL.
    ``document`` is the redacted content of ``run.json`` without its ``state``. ``ledger`` is live: at
    `Sink.close` it holds the run's final counts. ``spill`` is set where ``spill_dir`` is. ``queue_bytes``
    bounds all memory that holds captured tensors; a sink that keeps bytes beyond `Sink.write` tells
    ``hold`` how many more (or fewer, negative) it has now, and the queue then takes no more than the rest.
    ``store`` is the directory or URL, opened by whoever writes ``run.json``, who closes it too.
    """

    run_id: str
    url: str = field(repr=False)
    rank: int
    world_size: int
    document: Json
    ledger: Ledger
    fsync: bool = False
    spill: SpillLocation | None = None
    queue_bytes: int | None = None
    hold: Callable[[int], None] = field(default=_hold_nothing, repr=False, compare=False)
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def shown_url(self) -> str:
        """``url`` without credentials, for messages."""
        return redact_url(self.url)


@dataclass(frozen=True, slots=True)
class StepSummary:
    """All of a step that is not tensor bytes; handed over once, after the step's last record.

    ``calls`` are the call directories in order of entry. ``structures`` maps
    ``<call dir>/<direction>.json`` to its structure. ``rows`` are vLLM's request
    rows (None outside vLLM). ``extra`` holds further keys for ``step.json``.
    """

    step: int
    rank: int
    calls: Sequence[str]
    structures: Mapping[str, Json]
    counts: Counts
    started: str
    ended: str
    rows: Sequence[Json] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, records: Sequence[Json]) -> Json:
        """The ``step.json`` document around ``records`` (entries of `Record.describe` plus place)."""
        document: Json = {
            "layout": LAYOUT_VERSION,
            "step": self.step,
            "rank": self.rank,
            "started": self.started,
            "ended": self.ended,
            "ledger": self.counts.to_json(),
            "calls": list(self.calls),
            "records": list(records),
            **self.extra,
        }
        if self.rows is not None:
            document["rows"] = list(self.rows)
        return document

    def to_text(self, records: Iterable[str], packed: Mapping[str, str] | None = None) -> str:
        """`to_json` as one line of text; ``records`` are finished entries, ``packed`` further keys' JSON."""
        begin, end = compact(self.to_json(())).split('"records":[]', 1)
        more = "".join(f",{quoted(key)}:{value}" for key, value in (packed or {}).items())
        return f'{begin}"records":[{",".join(records)}]{end[:-1]}{more}}}\n'
