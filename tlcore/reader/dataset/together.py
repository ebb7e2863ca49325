"""Rows of tensors that lie in files of their own, step by step: those of many files read in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .places import Bytes
from .sources import Sources
from .tokens import Numbers


def reads_together(
    sources: Sources, places: Numbers, source: Numbers, row: Numbers, into: Numbers, target: Bytes
) -> Iterator[Callable[[], None]]:
    """Reads that put rows of sources, of these ``places``, to their places ``into`` in ``target``."""
    for place in np.unique(places).tolist():
        chosen = np.flatnonzero(places == place)
        order = chosen[np.lexsort((row[chosen], source[chosen]))]
        yield _job(sources, place, source[order], row[order], into[order], target)


def _job(
    sources: Sources, place: int, source: Numbers, row: Numbers, into: Numbers, target: Bytes
) -> Callable[[], None]:
    # What follows one another in both is one piece.
    apart = (np.diff(source) != 0) | (np.diff(row) != 1) | (np.diff(into) != 1)
    firsts = np.append(0, np.flatnonzero(apart) + 1)
    distinct, number = np.unique(source[firsts], return_inverse=True)
    counts = np.diff(np.append(firsts, len(source)))
    pieces = np.stack((number.reshape(-1), row[firsts], into[firsts], counts), axis=1).astype(np.int64)

    def work() -> None:
        for left in sources.read_rows(place, distinct, pieces, target).tolist():
            # Read by itself it is read otherwise, or what is wrong with it is told.
            for _, first, at, count in pieces[pieces[:, 0] == left].tolist():
                data = sources.read(int(distinct[left]), first, first + count)
                target[at : at + count] = np.frombuffer(data, np.uint8).reshape(count, -1)

    return work
