"""The token ids of a run's requests, in as little memory as they fit into: a run may have billions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...layout.checks import LARGEST_SIZE
from ...record import Json

Numbers = np.ndarray[Any, np.dtype[np.int64]]
_SMALL = (1 << 31) - 1


@dataclass
class Tokens:
    """The token ids that one request's steps tell of, and how long they say that its prompt is."""

    firsts: list[int] = field(default_factory=list)
    parts: list[array[int]] = field(default_factory=list)
    prompts: set[int | None] = field(default_factory=set)

    def add(self, entry: Json) -> None:
        """Take up an entry of `Step.token_entries`. Raises OverflowError for a position that there is not."""
        if entry["first_position"] > LARGEST_SIZE:
            raise OverflowError
        self.firsts.append(entry["first_position"])
        self.parts.append(_compact(entry["ids"][: entry["kept"]]))
        self.prompts.add(entry.get("prompt"))

    def at(self, positions: Numbers) -> Numbers:
        """The ids at these positions, -1 where one is unknown; of one that was read again the last counts."""
        if not self.firsts:
            return np.full(len(positions), -1)
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


def _compact(ids: Sequence[int]) -> array[int]:
    """Ids in memory. Raises OverflowError for one that no tensor of ids can have."""
    return array("i" if max(ids, default=0) <= _SMALL else "q", ids)
