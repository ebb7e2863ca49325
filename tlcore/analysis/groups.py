"""Statistics of many stored tensors: a group of them at a time, whose bytes are read together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

import torch

from ..errors import ReadError
from ..reader import Run, Step, TensorStream
from ..reader.tensor_stream import is_in_memory, open_together
from ..record import Json
from ..statistics.stored import Statistics, summarize_pieces, summarize_rows
from .measure import CHUNK

_MOST_BYTES = 8 << 20
# Values of tensors that are looked at in one call, so few that torch wakes no threads for them.
_TOGETHER = 1 << 14


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
        read = iter(_all_summarized(open_together(self._run.stored, stored)))
        found: list[Statistics | ReadError] = []
        for step, record in self._tensors:
            try:
                found.append(step.stats[str(record["name"])] if "stats" in record else next(read))
            except ReadError as error:
                found.append(error)
        self._tensors.clear()
        return found


def _all_summarized(payloads: Sequence[TensorStream | ReadError]) -> list[Statistics | ReadError]:
    """The statistics of each; small ones that are alike, as those of one tensor in many steps, together."""
    found: dict[int, Statistics | ReadError] = {}
    alike: dict[tuple[torch.dtype, int], list[int]] = {}
    for place, payload in enumerate(payloads):
        if isinstance(payload, ReadError):
            found[place] = payload
            continue
        total = prod(payload.shape)
        if is_in_memory(payload) and 0 < total <= _TOGETHER // 2:
            alike.setdefault((payload.dtype, total), []).append(place)
            continue
        try:
            found[place] = _summarized(payload, total)
        except ReadError as error:
            found[place] = error
    streams = [each for each in payloads if not isinstance(each, ReadError)]
    for (dtype, total), places in alike.items():
        count = _TOGETHER // total
        for begin in range(0, len(places), count):
            part = places[begin : begin + count]
            found.update(
                zip(part, _rows_summarized([payloads[at] for at in part], dtype, total), strict=True)
            )
    for stream in streams:
        stream.close()
    return [found[place] for place in range(len(payloads))]


def _rows_summarized(
    payloads: Sequence[TensorStream | ReadError], dtype: torch.dtype, total: int
) -> list[Statistics]:
    # Bytes can be put together whatever they stand for.
    rows = [each.read(0, total).view(torch.uint8) for each in payloads if not isinstance(each, ReadError)]
    return summarize_rows(torch.stack(rows).view(dtype))


def _summarized(payload: TensorStream, total: int) -> Statistics:
    return summarize_pieces(payload.read(at, min(at + CHUNK, total)) for at in range(0, total, CHUNK))
