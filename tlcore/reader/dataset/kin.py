"""Steps that differ from an earlier one in numbers alone: what was found of it is not looked for again.

A server that decodes has hundreds of them in turn, with rows of the same requests, one position on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...layout.checks import LARGEST_SIZE
from ...record import Json
from ..outlines import OutlinedStep
from .tokens import Numbers
from .wanted import Entry, Spans

# What of a document is told apart, or tells nothing of rows.
_ASIDE = frozenset(
    ("layout", "step", "rank", "started", "ended", "ledger", "calls", "records", "rows", "tokens")
)
# What makes rows, or token ids, that are not all of the request's text.
_UNUSUAL = ("accepted", "last", "drafts", "sequence")
_MOST_KEPT = 256


class TokenPlaces(NamedTuple):
    """Where among a step's numbers those of an entry of token ids are; ``ids`` follow one another."""

    request: str
    prompt: int | None
    first: int
    ids: slice


class _Numbers(NamedTuple):
    """Of one rank: the places of numbers that must be as they were, with these, and of its token ids."""

    places: Numbers
    expected: Numbers
    tokens: list[TokenPlaces]


class KinRows(NamedTuple):
    """What steps have that differ in numbers alone: the same entries, of which each has the same rows.

    The rows are those of ``spans`` but for their positions, which are at ``positions`` among the numbers of
    ``rank``.
    """

    entries: Sequence[Entry]
    spans: Spans
    rank: int
    positions: Numbers
    numbers: Mapping[int, _Numbers]

    def of(self, found: Mapping[int, Numbers]) -> int:
        """How many other such steps have what is known, one after the other; the next is looked at itself.

        ``found`` are the numbers ``[steps, numbers]`` of each rank.
        """
        if found.keys() != self.numbers.keys():
            return 0
        firsts = found[self.rank][:, self.positions]
        sound = _within(firsts)
        for rank, known in self.numbers.items():
            own = found[rank]
            sound &= (own[:, known.places] == known.expected).all(axis=1)
            if known.tokens:
                begin = min(min(each.first, each.ids.start) for each in known.tokens)
                end = max(max(each.first + 1, each.ids.stop) for each in known.tokens)
                # What is wrong is told by who looks at the step itself.
                sound &= _within(own[:, begin:end])
        return int(sound.argmin()) if not sound.all() else len(sound)

    @property
    def each_once(self) -> bool:
        """Whether no request's token ids are told twice in a step."""
        requests = [each.request for known in self.numbers.values() for each in known.tokens]
        return len(set(requests)) == len(requests)


def _within(numbers: Numbers) -> Any:
    """Which steps have nothing but positions, or token ids."""
    return (numbers.min(axis=1, initial=0) >= 0) & (numbers.max(axis=1, initial=0) <= LARGEST_SIZE)


class Kin:
    """Remembers what steps had of so many tensors, by `OutlinedStep.kin`, from the second of a kind on."""

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        # Of a kind that was met once, False.
        self._known: dict[Hashable, KinRows | bool | None] = {}

    def find(self, step: OutlinedStep) -> KinRows | None:
        """What earlier steps of its kind had."""
        found = self._known.get(step.kin)
        return found if isinstance(found, KinRows) else None

    def note(self, step: OutlinedStep, entries: Sequence[Entry], spans: Spans) -> None:
        """A step was looked at, of which all tensors have these rows."""
        kin = step.kin
        if kin not in self._known:
            # Most kinds have one step, and what is noted takes as long as to look at one.
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[kin] = False
        elif self._known[kin] is False:
            try:
                self._known[kin] = _kin_rows(step, entries, spans, self._tensors)
            except OverflowError:
                # Of numbers without a meaning here any may be there.
                self._known[kin] = None


def _kin_rows(step: OutlinedStep, entries: Sequence[Entry], spans: Spans, tensors: int) -> KinRows | None:
    """What is known of a step's kind; None of one whose rows may depend on its numbers."""
    # One a tensor, in the order of these.
    entries = sorted(entries, key=lambda entry: entry.number)
    if [entry.number for entry in entries] != list(range(tensors)):
        return None
    places, numbers = step.number_places, step.numbers
    (rank,) = {int(entry.record["rank"]) for entry in entries}
    listed = {str(call) for each in places[rank].get("call_rows") or () for call in each["calls"]}
    if any(entry.key.partition("/")[0] in listed for entry in entries):
        return None
    rows = places[rank].get("rows") or []
    if [row.get("request_id") for row in rows] != spans.requests:
        # Some have no rows in this step.
        return None
    found: dict[int, _Numbers] = {}
    for each, document in places.items():
        tokens = [_token_places(entry) for entry in document.get("tokens") or ()]
        fixed = sorted(_fixed(document))
        if None in tokens or any(key in row for row in document.get("rows") or () for key in _UNUSUAL):
            return None
        at = np.array(fixed, np.int64)
        found[each] = _Numbers(at, np.array(numbers[each], np.int64)[at], [one for one in tokens if one])
    positions = [row.get("first_position") for row in rows]
    return KinRows(entries, spans, rank, np.array(positions, np.int64), found)


def _token_places(entry: Json) -> TokenPlaces | None:
    ids = entry["ids"]
    if not ids or any(key in entry for key in _UNUSUAL):
        return None
    return TokenPlaces(
        str(entry["request_id"]), entry.get("prompt"), entry["first_position"], slice(ids[0], ids[-1] + 1)
    )


def _fixed(document: Json) -> Iterator[int]:
    """The places of numbers that decide which rows are whose, but for the positions of these."""
    for row in document.get("rows") or ():
        yield from (row["first_row"], row["rows"])
    for entry in document.get("tokens") or ():
        yield from _integers(entry.get("prompt"))
    for key, value in document.items():
        if key == "call_rows":
            for entry in value or ():
                yield from _integers({name: each for name, each in entry.items() if name != "sets"})
                for one in entry["sets"]:
                    yield from _integers({name: each for name, each in one.items() if name != "rows"})
        elif key not in _ASIDE:
            yield from _integers(value)


def _integers(value: Any) -> Iterator[int]:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if type(node) is int:
            yield node
        elif isinstance(node, (dict, list)):
            waiting += node.values() if isinstance(node, dict) else node
