"""Reading rows: those that lie near each other by one ranged read, several reads at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import ReadError
from ...layout.dtypes import torch_dtype
from .items import Items
from .places import Bytes as Bytes
from .table import Form, Table
from .together import reads_together
from .tokens import Numbers

if TYPE_CHECKING:
    import torch

# A request takes as long as this many bytes do, so rows between two that are wanted are read along.
_REMOTE_GAP_BYTES = 256 << 10
_LOCAL_GAP_BYTES = 64 << 10
_MOST_BYTES = 8 << 20
_MOST_USED = 4 << 30

Batch = dict[str, "torch.Tensor"]


class _Read(NamedTuple):
    """Rows ``[first, last)`` of a source; ``wanted`` of them go to the places ``into``."""

    source: int
    first: int
    last: int
    wanted: Numbers
    into: Numbers


class Maps:
    """Maps of the sources' files, as long as this lives: where each source begins, and its bytes."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._arrays = [np.frombuffer(each, np.uint8) for each in views]
        self._files = {id(each.obj): each.obj for each in views if isinstance(each.obj, mmap.mmap)}
        self.begins = np.array([each.ctypes.data for each in self._arrays], np.int64)
        self.sizes = np.array([each.size for each in self._arrays], np.int64)
        self._used = 0

    @property
    def whole(self) -> bool:
        """Whether all files are as long as they were."""
        return all(file.size() >= len(file) for file in self._files.values())

    def used(self, nbytes: int) -> None:
        """So many bytes were taken from there: what the system notes of each page is let go of at times."""
        self._used += nbytes
        if self._used < _MOST_USED or not hasattr(mmap, "MADV_DONTNEED"):
            return
        self._used = 0
        for file in self._files.values():
            file.madvise(mmap.MADV_DONTNEED)


class Rows:
    """The rows of one run's items by number, with what is known of each: token id, position, request.

    ``offset`` is the number of its first request among those of all runs that are read together.
    """

    def __init__(self, table: Table, items: Items, offset: int) -> None:
        self.names, self.forms = table.names, table.forms
        self.sources = table.sources
        self.count = int(items.ends[-1]) if len(items.ends) else 0
        self._pieces, self._ends = items.pieces, items.ends
        self._offset = offset
        self._ids = _token_ids(table, items)
        prompts = [table.tokens[each].prompt if each in table.tokens else None for each in table.requests]
        self._prompts = np.array([-1 if each is None else each for each in prompts], dtype=np.int64)
        used = np.unique(self._pieces.request)
        self.has_prompts = bool((self._prompts[used] >= 0).all())
        self.has_token_ids = bool((self._ids >= 0).all())

    def known_of(self, rows: Numbers) -> dict[str, Numbers]:
        """Position and request of rows by number, and token id and whether it is of the response."""
        piece = np.searchsorted(self._ends, rows, "right")
        positions = self._pieces.first[piece] + rows - self._begins(piece)
        request = self._pieces.request[piece]
        found: dict[str, Any] = {"positions": positions, "request": request + self._offset}
        if self.has_token_ids:
            found["token_ids"] = self._ids[rows].astype(np.int64)
        if self.has_prompts:
            found["response"] = positions >= self._prompts[request]
        return found

    def _begins(self, piece: Numbers) -> Numbers:
        begins: Numbers = self._ends[piece] - self._pieces.length[piece]
        return begins

    def maps(self) -> Maps | None:
        """Where all rows lie in maps of files; None where they do not. Raises MissingError or ReadError."""
        views = self.sources.maps()
        return None if views is None else Maps(views)

    def addresses(self, rows: Numbers, maps: Maps) -> Numbers:
        """The address of each row ``[rows, tensors]``. Raises ReadError for one that is not there."""
        piece = np.searchsorted(self._ends, rows, "right")
        source = self._pieces.source[piece]
        widths = np.array(list(map(row_width, self.forms)), np.int64)
        begin = (self._pieces.begin[piece] + (rows - self._begins(piece))[:, None]) * widths
        if (begin + widths > maps.sizes[source]).any():
            raise ReadError(f"{self.sources.url}: source of rows ends too early")
        found: Numbers = maps.begins[source] + begin
        return found

    def jobs(
        self, rows: Numbers, into: Sequence[Bytes], places: Numbers | None
    ) -> Iterator[Callable[[], None]]:
        """Reads that together put the rows of each tensor into ``into`` (bytes, a row for each).

        The rows go to ``places`` there, in their order by default.
        """
        piece = np.searchsorted(self._ends, rows, "right")
        offset = rows - self._begins(piece)
        for number, target in enumerate(into):
            if not target.shape[1]:
                continue
            source = self._pieces.source[piece, number]
            row = self._pieces.begin[piece, number] + offset
            put = np.arange(len(rows)) if places is None else places
            together = self.sources.together(source)
            if (own := together >= 0).any():
                yield from reads_together(
                    self.sources, together[own], source[own], row[own], put[own], target
                )
                source, row, put = source[~own], row[~own], put[~own]
            for read in self._reads(source, row, target.shape[1]):
                yield _job(self, read._replace(into=put[read.into]), target)

    def _reads(self, source: Numbers, row: Numbers, width: int) -> Iterator[_Read]:
        if not len(row):
            return
        order = np.lexsort((row, source))
        source, row = source[order], row[order]
        gap = _LOCAL_GAP_BYTES if self.sources.is_local else _REMOTE_GAP_BYTES
        far = np.diff(row) * width > max(gap, width)
        borders = np.flatnonzero(far | (np.diff(source) != 0)) + 1
        most = max(1, _MOST_BYTES // width)
        for begin, end in zip([0, *borders.tolist()], [*borders.tolist(), len(row)], strict=True):
            while begin < end:
                first = int(row[begin])
                until = begin + int(np.searchsorted(row[begin:end], first + most, "left"))
                own = slice(begin, until)
                yield _Read(int(source[begin]), first, int(row[until - 1]) + 1, row[own] - first, order[own])
                begin = until


def _job(rows: Rows, read: _Read, target: Bytes) -> Callable[[], None]:
    def work() -> None:
        into, wanted = _as_slice(read.into), _as_slice(read.wanted)
        memory = _memory_of(target, into) if isinstance(wanted, slice) else None
        if len(read.wanted) != read.last - read.first:
            memory = None
        data = rows.sources.read(read.source, read.first, read.last, memory)
        if data is not memory:
            found = np.frombuffer(data, dtype=np.uint8).reshape(read.last - read.first, -1)
            target[into] = found[wanted]

    return work


def _memory_of(target: Bytes, into: slice | Numbers) -> memoryview | None:
    """The memory of rows that lie in one piece; None of others."""
    own = target[into] if isinstance(into, slice) else None
    return own.reshape(-1).data if own is not None and own.flags.c_contiguous else None


def _as_slice(numbers: Numbers) -> slice | Numbers:
    """Numbers that follow one another as a slice, which copies nothing twice."""
    first, last = int(numbers[0]), int(numbers[-1])
    follow = last - first == len(numbers) - 1 and bool((np.diff(numbers) == 1).all())
    return slice(first, last + 1) if follow else numbers


def _token_ids(table: Table, items: Items) -> np.ndarray[Any, Any]:
    """The token id of each row, -1 where it is not known; nothing where none is."""
    pieces, ends = items.pieces, items.ends
    if not table.tokens or not len(ends):
        return np.full(1, -1)
    small = all(each.small for each in table.tokens.values())
    found = np.full(int(ends[-1]), -1, dtype=np.int32 if small else np.int64)
    order = np.argsort(pieces.request, kind="stable")
    borders = np.flatnonzero(np.diff(pieces.request[order])) + 1
    for own in np.split(order, borders):
        tokens = table.tokens.get(table.requests[int(pieces.request[own[0]])])
        if tokens is not None:
            lengths = pieces.length[own]
            within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            rows = np.repeat(ends[own] - lengths, lengths) + within
            found[rows] = tokens.at(np.repeat(pieces.first[own], lengths) + within)
    return found


_KNOWN: dict[str, Any] = {"response": np.bool_}


class AllRows:
    """The rows of several runs, those of the first run first."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.names, self.forms = parts[0].names, parts[0].forms
        self._begins = np.cumsum([0, *(part.count for part in parts)])
        self.is_local = all(part.sources.is_local for part in parts)
        self.known = ["positions", "request"]
        self.known += ["token_ids"] if all(part.has_token_ids for part in parts) else []
        self.known += ["response"] if all(part.has_prompts for part in parts) else []

    @property
    def row_bytes(self) -> int:
        """How many bytes one row has of all tensors together."""
        return sum(map(row_width, self.forms))

    def maps(self) -> Maps | None:
        """Of the rows of one run that lies here, where they do in maps of files. Raises as reading does."""
        return self.parts[0].maps() if self.is_local and len(self.parts) == 1 else None

    def places(self, rows: Numbers, maps: Maps) -> tuple[Numbers, dict[str, Any]]:
        """The address of each row of each tensor, and what is known of the rows. Raises ReadError."""
        (part,) = self.parts
        return part.addresses(rows, maps), {
            name: each for name, each in part.known_of(rows).items() if name in self.known
        }

    def load(self, rows: Numbers, pool: Executor | None) -> Batch:
        """Rows by number: each tensor's ``[rows, ...]``, and what is known of them. Raises ReadError."""
        import torch

        data = [new_tensor((len(rows), row_width(form)), torch.uint8) for form in self.forms]
        known = self.fill(rows, [each.numpy() for each in data], pool)
        tensors = [_typed(each, form) for each, form in zip(data, self.forms, strict=True)]
        found: Batch = dict(zip(self.names, tensors, strict=True))
        return found | {name: torch.from_numpy(values) for name, values in known.items()}

    def fill(self, rows: Numbers, into: Sequence[Bytes], pool: Executor | None) -> dict[str, Any]:
        """Put the rows of each tensor into memory, and return what is known of them. Raises ReadError."""
        known = {name: np.empty(len(rows), dtype=_KNOWN.get(name, np.int64)) for name in self.known}
        jobs: list[Callable[[], None]] = []
        for number, part in enumerate(self.parts):
            first, last = self._begins[number : number + 2]
            own = np.flatnonzero((rows >= first) & (rows < last))
            if not len(own):
                continue
            chosen = rows[own] - first
            for name, values in part.known_of(chosen).items():
                if name in known:
                    known[name][own] = values
            jobs += part.jobs(chosen, into, None if len(own) == len(rows) else own)
        _run(jobs, pool)
        return known


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor. NumPy asks the system for large pages, without which touching it takes longer."""
    import torch

    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


def _run(jobs: Sequence[Callable[[], None]], pool: Executor | None) -> None:
    if pool is None or len(jobs) < 2:
        for job in jobs:
            job()
        return
    futures: list[Future[None]] = []
    try:
        for job in jobs:
            futures.append(pool.submit(job))
        for future in futures:
            future.result()
    finally:
        # After an error, too: the caller may use the memory for something else, which none must write into.
        wait([future for future in futures if not future.cancel()])


def row_width(form: Form) -> int:
    """How many bytes a row has."""
    dtype = torch_dtype(form.dtype)
    assert dtype is not None
    return prod(form.shape) * dtype.itemsize


def _typed(data: torch.Tensor, form: Form) -> torch.Tensor:
    dtype = torch_dtype(form.dtype)
    assert dtype is not None
    return data.view(-1).view(dtype).view(data.shape[0], *form.shape)
