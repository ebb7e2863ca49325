"""The token ids of a run's requests, in as little memory as they fit into: a run may have billions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...layout.checks import LARGEST_SIZE

Numbers = np.ndarray[Any, np.dtype[np.int64]]
_SMALL = (1 << 31) - 1
# So many are looked through one by one.
_FEW_PARTS = 8


@dataclass
class Tokens:
    """The token ids that one request's steps tell of, and how long they say that its prompt is."""

    firsts: list[int] = field(default_factory=list)
    parts: list[array[int]] = field(default_factory=list)
    prompts: set[int | None] = field(default_factory=set)

    def add(self, first: int, ids: Sequence[int], prompt: int | None) -> None:
        """Take up the ids from a position on. Raises OverflowError for a position that there is not."""
        if first > LARGEST_SIZE:
            raise OverflowError
        self.prompts.add(prompt)
        kind = "i" if max(ids, default=0) <= _SMALL else "q"
        last = self.parts[-1] if self.parts else None
        if last is not None and last.typecode == kind and self.firsts[-1] + len(last) == first:
            # A list of them for each step would take twenty times the memory.
            last.extend(ids)
            return
        self.firsts.append(first)
        self.parts.append(array(kind, ids))

    def add_several(self, firsts: Numbers, ids: Numbers, prompt: int | None) -> None:
        """What `add` does of several steps, of each the position of its first id and its ids."""
        if bool((np.diff(firsts) == ids.shape[1]).all()):
            self.add(int(firsts[0]), ids.ravel().tolist(), prompt)
            return
        for first, own in zip(firsts.tolist(), ids.tolist(), strict=True):
            self.add(first, own, prompt)

    def at(self, positions: Numbers) -> Numbers:
        """The ids at these positions, -1 where one is unknown; of one that was read again the last counts."""
        if len(self.parts) > _FEW_PARTS:
            return self._among_many(positions)
        found = np.full(len(positions), -1)
        for first, part in zip(self.firsts, self.parts, strict=True):
            places = positions - first
            there = (places >= 0) & (places < len(part))
            found[there] = np.frombuffer(part, np.dtype(part.typecode))[places[there]]
        return found

    def _among_many(self, positions: Numbers) -> Numbers:
        pairs = zip(self.firsts, map(len, self.parts), strict=True)
        known = np.concatenate([np.arange(first, first + count) for first, count in pairs])
        # The last comes first, and is found.
        places, where = np.unique(known[::-1], return_index=True)
        if not len(places):
            return np.full(len(positions), -1)
        ids = np.concatenate([np.array(part, dtype=np.int64) for part in self.parts])[::-1][where]
        found = np.searchsorted(places, positions).clip(0, len(places) - 1)
        return np.where(places[found] == positions, ids[found], -1)

    @property
    def small(self) -> bool:
        """Whether all ids fit into 32 bits."""
        return all(part.typecode == "i" for part in self.parts)

    @property
    def prompt(self) -> int | None:
        """The prompt's length; None where the steps do not all say the same."""
        return next(iter(self.prompts)) if len(self.prompts) == 1 else None
