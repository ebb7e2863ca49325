"""Statistics of many stored tensors: a group of them at a time, whose bytes are read together."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

from ..errors import ReadError
from ..reader import Run, Step, TensorStream
from ..reader.tensor_stream import open_together
from ..record import Json
from ..statistics.stored import Statistics, summarize_pieces
from .measure import CHUNK

_MOST_BYTES = 8 << 20


class Group:
    """Up to ``most`` tensors, perhaps of several steps, that one thread looks at; the small read together."""

    def __init__(self, run: Run, most: int) -> None:
        self._run = run
        self._most = most
        self._tensors: list[tuple[Step, Json]] = []
        self._bytes = 0
        self._future: Future[list[Statistics | ReadError]] | None = None

    def add(self, step: Step, record: Json) -> int:
        """Take in one more; returns its place."""
        self._tensors.append((step, record))
        self._bytes += int(record.get("bytes", 0))
        return len(self._tensors) - 1

    @property
    def is_full(self) -> bool:
        """Whether it is worth a thread's while."""
        return self._bytes >= _MOST_BYTES or len(self._tensors) >= self._most

    def submit(self, pool: ThreadPoolExecutor) -> None:
        """Have it looked at."""
        self._future = pool.submit(self._look)

    def found(self, place: int) -> Statistics:
        """The statistics of one of them. Raises ReadError."""
        assert self._future is not None
        found = self._future.result()[place]
        if isinstance(found, ReadError):
            raise found
        return found

    def _look(self) -> list[Statistics | ReadError]:
        stored = [record for _, record in self._tensors if "stats" not in record]
        streams = iter(open_together(self._run.stored, stored))
        found: list[Statistics | ReadError] = []
        for step, record in self._tensors:
            try:
                found.append(
                    step.stats[str(record["name"])] if "stats" in record else _summarized(next(streams))
                )
            except ReadError as error:
                found.append(error)
        self._tensors.clear()
        return found


def _summarized(payload: TensorStream | ReadError) -> Statistics:
    if isinstance(payload, ReadError):
        raise payload
    total = prod(payload.shape)
    try:
        return summarize_pieces(payload.read(at, min(at + CHUNK, total)) for at in range(0, total, CHUNK))
    finally:
        payload.close()
