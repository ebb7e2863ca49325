"""A run's rows, or those of several runs, as data sets of torch."""

from __future__ import annotations

import hashlib
import logging
import operator
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import ReadError
from ...layout.windows import window_of
from ..lasting import lasting_objects
from .items import Items, Per, items_of
from .loaded import Loaded
from .order import Order, Plan
from .reading import AllRows, Batch, Bytes, Maps, Rows
from .table import Form, Table
from .threads import Threads
from .tokens import Numbers

if TYPE_CHECKING:
    from ..run import Run
    from .loader import Loader

BUFFER_BYTES = 192 << 20
_OF_ITEM = ("request",)

log = logging.getLogger("tlcore")


class RowDataset(Dataset[Batch]):
    """Tokens, pieces of ``context`` positions, or whole requests, in the order in which they were captured.

    An item is a dictionary: each tensor by the name that was asked for (``[...]`` of a token, ``[positions,
    ...]`` of a sequence), ``positions``, ``request`` (a number: `requests` has the ids), and where they are
    known of all rows ``token_ids``, and ``response``: whether a position lies behind its request's prompt.
    ``left_out`` says which requests nothing is there of, and why, ``adapters`` which adapter (LoRA) the model
    had on for each of ``requests``. Made by `Run.dataset`; ``+`` joins several.
    """

    def __init__(self, parts: Sequence[tuple[Table, Items]], per: Per, context: int | None) -> None:
        self._made_of = list(parts)
        self.per, self.context = per, context
        self.requests: list[str] = []
        self.adapters: list[str | None] = []
        self.left_out: dict[str, str] = {}
        rows: list[Rows] = []
        for table, items in parts:
            rows.append(Rows(table, items, len(self.requests)))
            self.requests += table.requests
            self.adapters += map(table.adapters.get, table.requests)
            # Requests of other runs may go by the same ids.
            for request, reason in items.left_out.items():
                again = request in self.left_out
                self.left_out[f"{request} of {table.url}" if again else request] = reason
        self._rows = AllRows(rows)
        self._starts, self._counts = _joined([items for _, items in parts], [each.count for each in rows])
        self._count = sum(each.count for each in rows) if self._starts is None else len(self._starts)
        self._threads = Threads(self._rows.is_local)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, as they were asked for."""
        return list(self._rows.names)

    @property
    def forms(self) -> dict[str, Form]:
        """The dtype, and the shape of one row, of each tensor."""
        return dict(zip(self.names, self._rows.forms, strict=True))

    @property
    def known(self) -> list[str]:
        """What items have beside their tensors."""
        return list(self._rows.known)

    @property
    def has_token_ids(self) -> bool:
        """Whether the token ids of all rows are known."""
        return "token_ids" in self._rows.known

    @property
    def has_prompts(self) -> bool:
        """Whether it is known of all requests where their prompt ends."""
        return "response" in self._rows.known

    @property
    def row_bytes(self) -> int:
        """How many bytes one row has of all tensors together."""
        return self._rows.row_bytes

    @property
    def is_local(self) -> bool:
        """Whether all runs lie on disks of this machine."""
        return self._rows.is_local

    @property
    def ragged(self) -> bool:
        """Whether items differ in length: whole requests."""
        return self.context is None and self.per == "request"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Several items, read together and into one memory."""
        items = np.array([_checked(index, self._count) for index in indices], dtype=np.int64)
        return self.split(items, self._load(items, self._threads.pool()))

    def __iter__(self) -> Iterator[Batch]:
        """The items in their order, read in large pieces."""
        return iter(OrderedDataset(self, Plan(None, 0, BUFFER_BYTES // 2)))

    def __add__(self, other: Dataset[Any]) -> RowDataset:  # type: ignore[override]  # torch's own is no map
        """The items of this and, behind them, another's. Raises ReadError where they differ in kind."""
        if not isinstance(other, RowDataset):
            raise ReadError(f"{type(other).__name__} is no data set of a run, which alone can be joined")
        for what, own, its in zip(("names", "rows", "kind"), self._kind, other._kind, strict=True):
            if own != its:
                raise ReadError(f"data sets cannot be joined: their {what} differ, {own} and {its}")
        return RowDataset([*self._made_of, *other._made_of], self.per, self.context)

    @property
    def _kind(self) -> tuple[Any, ...]:
        return self.names, self._rows.forms, (self.per, self.context)

    @property
    def fingerprint(self) -> str:
        """Equal for data sets of the same items in the same order."""
        digest = hashlib.sha256(repr((self._kind, self._count, self.requests)).encode())
        for table, items in self._made_of:
            digest.update(os.path.basename(table.url).encode())
            for column in (items.pieces.request, items.pieces.first, items.pieces.length, items.starts):
                digest.update(b"" if column is None else column.tobytes())
        return digest.hexdigest()

    def shuffled(self, seed: int, epoch: int = 0, buffer_bytes: int = BUFFER_BYTES) -> OrderedDataset:
        """The same items shuffled over all runs, as a data set to be read from its first item to its last.

        The same order for the same ``seed``, ``epoch`` and ``buffer_bytes``, wherever it is read. As much is
        kept in memory at most: the items being read, and those read ahead.
        """
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
        return OrderedDataset(self, Plan(seed, epoch, max(1, buffer_bytes // 2)))

    def loader(self, batch_size: int, **options: Any) -> Loader:
        """A `Loader`: batches in a shuffled order that can be interrupted and taken up again."""
        from .loader import Loader

        return Loader(self, batch_size, **options)

    def order(self, plan: Plan) -> Order:
        """The order that a plan means."""
        return Order(self._count, self._rows.row_bytes, self._counts, plan)

    def load(self, items: Numbers, pool: Executor | None) -> Loaded:
        """Items by number, in memory. Raises ReadError."""
        ordered = np.sort(items)
        places = np.searchsorted(ordered, items)
        return Loaded(self, self._load(ordered, pool), ordered, places)

    def _load(self, items: Numbers, pool: Executor | None) -> Batch:
        return self._rows.load(self.rows_of(items), pool)

    def fill(self, items: Numbers, into: Sequence[Bytes]) -> dict[str, Any]:
        """Put the rows of items, one item after the other, into memory: bytes, of each tensor in `names`.

        Returns what is known of them, as arrays. Raises ReadError.
        """
        return self._rows.fill(self.rows_of(items), into, self._threads.pool())

    def maps(self) -> Maps | None:
        """Maps of the files that all rows lie in, of one run of this machine. Raises ReadError."""
        return self._rows.maps()

    def places(self, items: Numbers, maps: Maps) -> tuple[Numbers, dict[str, Any]]:
        """The address of each row ``[rows, tensors]``, one item after the other, and what is known of them.

        Raises ReadError.
        """
        return self._rows.places(self.rows_of(items), maps)

    def rows_of(self, items: Numbers) -> Numbers:
        """The numbers of the rows of items, one item after the other."""
        if self._starts is None or self._counts is None:
            return items
        starts, counts = self._starts[items], self._counts[items]
        ends = np.cumsum(counts)
        rows: Numbers = np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
        return rows

    def counts_of(self, items: Numbers) -> Numbers:
        """How many rows items have."""
        return np.ones(len(items), dtype=np.int64) if self._counts is None else self._counts[items]

    def split(self, items: Numbers, rows: Batch) -> list[Batch]:
        """The items, of whose rows one after the other is given, as views of these."""
        if self._starts is None:
            columns = [values.unbind(0) for values in rows.values()]
        else:
            counts = self.counts_of(items)
            firsts = torch.from_numpy(np.cumsum(counts) - counts)
            columns = [
                values[firsts].unbind(0) if name in _OF_ITEM else torch.split(values, counts.tolist())
                for name, values in rows.items()
            ]
        return [dict(zip(rows, each, strict=True)) for each in zip(*columns, strict=True)]

    def item(self, rows: Batch) -> Batch:
        """An item of its rows: a token's without the dimension of positions, a sequence's request once."""
        if self._starts is None:
            return {name: values[0] for name, values in rows.items()}
        return {name: values[0] if name in _OF_ITEM else values for name, values in rows.items()}

    def stacked(self, rows: Batch, items: int) -> Batch:
        """Items of equal length as one dictionary of tensors ``[items, ...]``."""
        if self._starts is None:
            return rows
        found = {name: values.view(items, -1, *values.shape[1:]) for name, values in rows.items()}
        return found | {name: found[name][:, 0] for name in _OF_ITEM}

    def __repr__(self) -> str:
        what = f"pieces of {self.context} positions" if self.context else f"{self.per}s"
        runs = f" of {len(self._made_of)} runs" if len(self._made_of) > 1 else ""
        return f"<RowDataset: {self._count} {what}{runs}, {', '.join(self.names)}>"


class OrderedDataset(Dataset[Batch]):
    """The items of a data set in the order of a plan, one window after the other in memory.

    Made to be read in order, by any sampler that goes forward: one window is in memory, and the next is read
    meanwhile.
    """

    def __init__(self, data: RowDataset, plan: Plan) -> None:
        self.data = data
        self.order = data.order(plan)
        self._windows: OrderedDict[int, Future[Loaded]] = OrderedDict()
        self._threads = Threads(data.is_local)
        self._ahead = Threads(True, 1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Several items, each as a part of one memory for those of a window that follow one another."""
        places = np.array([_checked(index, len(self)) for index in indices], dtype=np.int64)
        windows = self.order.windows_of(places)
        found: list[Batch] = []
        for own in np.split(places, np.flatnonzero(np.diff(windows)) + 1) if len(places) else ():
            window = self.order.window_of(int(own[0]))
            found += self._window(window, len(self)).several(own - self.order.bounds(window)[0])
        return found

    def __iter__(self) -> Iterator[Batch]:
        """All items in order."""
        for window, count in self._all():
            yield from map(window.one, range(count))

    def views(self) -> Iterator[Batch]:
        """All items in order, not copied: whoever keeps one keeps all of its window."""
        for window, count in self._all():
            yield from map(window.view, range(count))

    def _all(self) -> Iterator[tuple[Loaded, int]]:
        for number in range(self.order.windows):
            begin, end = self.order.bounds(number)
            yield self._window(number, len(self)), end - begin

    def batches(self, begin: int, end: int, stop: int) -> Iterator[list[Batch] | Batch]:
        """The items at places ``[begin, end)``, a part for each window; none is wanted from ``stop`` on."""
        while begin < end:
            window = self.order.window_of(begin)
            first, last = self.order.bounds(window)
            until = min(end, last)
            yield self._window(window, stop).take(begin - first, until - first)
            begin = until

    def _window(self, number: int, stop: int) -> Loaded:
        """A window, while the next is read."""
        if self._ahead.changed():
            # Another process has threads and files of its own.
            self._windows.clear()
        current = self._windows.pop(number, None) or self._start(number)
        ahead = number + 1
        following = self._windows.pop(ahead, None)
        self._windows.clear()
        self._windows[number] = current
        found = current.result()
        if ahead < self.order.windows and self.order.bounds(ahead)[0] < stop:
            self._windows[ahead] = following or self._start(ahead)
        return found

    def _start(self, number: int) -> Future[Loaded]:
        pool = self._threads.pool()
        return self._ahead.always().submit(lambda: self.data.load(self.order.items(number), pool))

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_windows": OrderedDict()}

    def __repr__(self) -> str:
        return f"<OrderedDataset of {self.data!r}, {self.order.plan}>"


def _joined(items: Sequence[Items], rows: Sequence[int]) -> tuple[Numbers | None, Numbers | None]:
    """Starts and counts over all runs; none where each row is an item."""
    if items[0].starts is None:
        return None, None
    offsets = np.cumsum([0, *rows])[:-1]
    starts = [
        cast(Numbers, each.starts) + offset for each, offset in zip(items, offsets.tolist(), strict=True)
    ]
    return np.concatenate(starts), np.concatenate([cast(Numbers, each.counts) for each in items])


def _checked(index: int, count: int) -> int:
    found = operator.index(index)
    found += count if found < 0 else 0
    if not 0 <= found < count:
        raise IndexError(f"item {index} of {count}")
    return found


def make_dataset(
    run: Run, names: str | Sequence[str], rows: Any, context: int | None, per: Per
) -> RowDataset:
    """The data set of one run; as `Run.dataset` says. Raises ReadError."""
    asked = [names] if isinstance(names, str) else list(names)
    if not asked or len(set(asked)) != len(asked):
        raise ReadError(f"{run.url}: a data set needs names of tensors, each once: {asked}")
    if per not in ("token", "request"):
        raise ReadError(f'{run.url}: per={per!r} is neither "token" nor "request"')
    if context is not None and (per == "request" or type(context) is not int or context < 1):
        problem = "is a number of positions, at least 1, and not for whole requests"
        raise ReadError(f"{run.url}: context={context!r}: it {problem}")
    try:
        window = window_of(rows)
    except ValueError as error:
        raise ReadError(f"{run.url}: rows={rows!r}: {error}") from None
    with lasting_objects():
        table = Table(run, asked)
    if run.injection is not None:
        log.warning("%s: a data set of a run that was %s", run.url, run.injection)
    return RowDataset([(table, items_of(table, window, per, context))], per, context)
