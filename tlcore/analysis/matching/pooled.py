"""What a pooling model of vLLM's gives: one tensor for each request, in a list in the order of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...reader import Step
from ..results import TensorResult
from .pairs import Key, Located, Pair, absent

# The module by which vLLM calls it, in every model.
_POOLER = "pooler"


@dataclass(slots=True)
class Pooled:
    """One run's results of requests, of whatever shape, by the call and the request."""

    found: dict[tuple[Key, str], tuple[Key, Located]] = field(default_factory=dict)

    def take(self, step: Step, key: Key, counted: Key, source: Located, labels: Mapping[str, str]) -> bool:
        """Take up a tensor, if it is the result of a request."""
        record, rows = source.records[0], step.rows
        path = record["path"]
        if rows is None or (record["module"], record["direction"]) != (_POOLER, "outputs") or len(path) != 1:
            return False
        place = path[0]
        if type(place) is not int or not 0 <= place < len(rows):
            return False
        request = labels[str(rows[place]["request_id"])]
        self.found[(*counted[:-1], ()), request] = key, source
        return True


def pair_pooled(a: Pooled, b: Pooled) -> tuple[list[Pair], list[TensorResult]]:
    """Pairs of what both runs gave a request, and what only one did."""
    pairs, missing = [], []
    for side, (mine, theirs) in enumerate(((a, b), (b, a))):
        for which, (key, source) in mine.found.items():
            other = theirs.found.get(which)
            if other is None:
                missing.append(absent(key, source, side, which[1]))
            elif side == 0:
                pairs.append(Pair(key, source, other[1]))
    return pairs, missing
