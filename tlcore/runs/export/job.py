"""What a writer of a format is given, and what it asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from ...errors import BackendError
from ...reader.dataset.dataset import OrderedDataset, RowDataset
from ...reader.dataset.reading import Bytes, Maps
from .target import Target
from .values import Column, in_order

_T = TypeVar("_T")
# Tells how many more items are written.
Advance = Callable[[int], None]


class Memory(threading.local):
    """Memory that was touched before: taking new memory costs more than reading into it.

    Each thread and each process has its own, as long as the job is there.
    """

    _kept: Bytes = np.empty(0, np.uint8)

    def take(self, size: int) -> Bytes:
        """So many bytes, until the next are taken."""
        if len(self._kept) < size:
            self._kept = np.empty(size, np.uint8)
        return self._kept[:size]

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


class KeptMaps:
    """Maps of the run's files that all threads of a process share: each page is looked up once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Maps | None = None

    def of(self, data: RowDataset) -> Maps | None:
        """Those of a data set's files, where all lie in some. Raises MissingError or ReadError."""
        with self._lock:
            if self._kept is None:
                self._kept = data.maps()
            return self._kept

    def __reduce__(self) -> tuple[type[KeptMaps], tuple[()]]:
        return KeptMaps, ()


@dataclass(frozen=True)
class Job:
    """The items, the columns of each, and where they go. Goes into other processes.

    ``run_id`` and ``url`` tell whose rows they are, ``injection`` what is to be known of these where results
    of another run stand in; ``window_bytes`` is how much of them is read at a time.
    """

    data: RowDataset
    columns: Sequence[Column]
    target: Target
    loss: str
    run_id: str
    url: str
    window_bytes: int
    injection: str | None = None
    memory: Memory = field(default_factory=Memory)
    maps: KeptMaps = field(default_factory=KeptMaps)

    def ordered(self) -> OrderedDataset:
        """The items as they lie, read a window at a time."""
        return in_order(self.data, self.window_bytes)


@dataclass(frozen=True)
class Part:
    """Some windows of the items, which become files that nothing else writes: ``number`` of ``count``."""

    number: int
    count: int
    begin: int
    end: int


class Workers(Protocol):
    """Who does the parts of a job."""

    def each(
        self, work: Callable[[Job, Part, Advance], _T], job: Job, parts: Sequence[Part]
    ) -> Generator[_T, None, None]:
        """What ``work`` returns of each part, in order. Raises as it does, or BackendError.

        To be closed: when it is, nobody writes any more.
        """
        ...

    @property
    def share_memory(self) -> bool:
        """Whether they write into a file that another one has opened."""
        ...


def do_all(
    workers: Workers, work: Callable[[Job, Part, Advance], None], job: Job, parts: Sequence[Part]
) -> None:
    """Have all parts done. Raises as ``work`` does, or BackendError; nobody writes any more then."""
    with closing(workers.each(work, job, parts)) as done:
        for _ in done:
            pass


def parts_of(job: Job, row_bytes: int, most_bytes: int) -> list[Part]:
    """Parts of whole windows, each of about ``most_bytes`` where a row has ``row_bytes``.

    They depend on the items alone, so that whoever writes them writes the same files.
    """
    order = job.ordered().order
    counts = [int(job.data.counts_of(order.items(window)).sum()) for window in range(order.windows)]
    bounds: list[tuple[int, int]] = []
    begin = held = 0
    for window, count in enumerate(counts):
        if window > begin and (held + count) * row_bytes > most_bytes:
            bounds.append((begin, window))
            begin, held = window, 0
        held += count
    bounds.append((begin, len(counts)))
    return [Part(number, len(bounds), *each) for number, each in enumerate(bounds)]


def pyarrow() -> Any:
    """The package. Raises BackendError where it is not there."""
    try:
        import pyarrow
    except ImportError:
        raise BackendError("this format needs pyarrow: pip install 'tlcore[arrow]'") from None
    return pyarrow
