"""A step's tensors by what they are: rank, module, call, direction and path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ...layout.row_scale import presented
from ...reader import Step
from ...reader.placements import as_whole
from ...record import Json
from .conventions import Rename, apply
from .experts import with_experts
from .pairs import Key, Located
from .rules import Rules


def keyed(step: Step, rules: Rules, rename: bool) -> dict[Key, Located]:
    """A step's tensors by what they are, in order of execution (ranks of a stage side by side).

    Records stand in ``step.json`` in the order in which they came about: inputs at entry, outputs at
    return, so a child's output before its parent's.
    """
    side = 0 if rename else 1
    calls = renamed(rules, rename)
    found: dict[Key, Located] = {}
    for rank, record in _ordered(step, rules.joins_ranks(side)):
        module, call = calls.of(rank, str(record["module"]), int(record["call"]))
        direction = str(record["direction"])
        if not rules.wants(module, direction):
            continue
        key = (rank, module, call, direction, tuple(record["path"]))
        if rules.leaves_out(key):
            continue
        # What tells how it is joined is joined also where the ranks otherwise are held one by one.
        is_spread = side == rules.spread or rules.both_spread
        tells = "part" in record and "or_alike" not in record["part"]
        joined = rules.joins_ranks(side) or (is_spread and tells)
        if joined and not rules.joins_ranks(side):
            if record["part"]["tp_rank"]:
                continue
            record = as_whole(record)
        found[key] = Located(step.number, (str(record["name"]),), (presented(record),), joined)
    found = with_experts(found)
    keeps = rules.spread in (None, side) or rules.both_spread
    return found if keeps else _on_each_rank(found, rules.ranks)


def _on_each_rank(found: Mapping[Key, Located], ranks: Sequence[int]) -> dict[Key, Located]:
    """One model's tensors as each of some ranks would have them."""
    # Objects of their own: their order in the run is known by them.
    return {(rank, *key[1:]): replace(source) for key, source in found.items() for rank in ranks}


def _ordered(step: Step, unshard: bool) -> Iterator[tuple[int, Json]]:
    """A step's records with their rank, or with the replica that they belong to."""
    if unshard:
        yield from ((step.replica(record["rank"]), record) for record in step.wholes)
        return
    place: dict[int, int] = defaultdict(int)
    ordered: list[tuple[int, int, int, Json]] = []
    for record in step.records:
        rank = int(record["rank"])
        ordered.append((step.stage(rank), place[rank], rank, record))
        place[rank] += 1
    yield from (entry[2:] for entry in sorted(ordered, key=lambda entry: entry[:3]))


def renamed(rules: Rules, rename: bool) -> Calls:
    """The names that a step's modules go by: A's (``rename``) are turned into B's, or both into others."""
    return Calls(rules.maps if rename else rules.maps_b)


class Calls:
    """Renames modules; calls of several modules that get one name are numbered in call order."""

    def __init__(self, maps: Sequence[Rename]) -> None:
        self._maps = maps
        self._seen: dict[tuple[int, str], dict[tuple[str, int], int]] = defaultdict(dict)

    def of(self, rank: int, module: str, call: int) -> tuple[str, int]:
        """The module and call that one counts as."""
        name = apply(module, self._maps)
        calls = self._seen[rank, name]
        if all(other == module for other, _ in calls):
            return name, calls.setdefault((module, call), call)
        return name, calls.setdefault((module, call), max(calls.values()) + 1)
