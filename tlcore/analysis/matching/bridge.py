"""Two implementations of one model: what one keeps in two tensors or elsewhere, the other has whole.

vLLM's decoder layers take and return a hidden state and a residual, whose sum is what Hugging Face's take
and return. vLLM's norms take both, add them, and return the normed sum beside the new residual.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...reader import Step
from .code import aligned
from .fused import Parts, apart, parts_of
from .pairs import Key, Located
from .rules import Rules

Call = tuple[int, str, int, str]
Kind = tuple[bool, int]
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)", re.IGNORECASE)
_INTEGERS = ("int", "uint", "bool")


@dataclass(frozen=True, slots=True)
class Plan:
    """How one side's keys become the other's: ``sums`` by new key, ``renames``, and what takes no part.

    ``parts`` are what a tensor counts as that the other side has in several.
    """

    sums: dict[Key, tuple[Key, ...]] = field(default_factory=dict)
    renames: dict[Key, Key] = field(default_factory=dict)
    dropped: set[Key] = field(default_factory=set)
    parts: Parts = field(default_factory=dict)

    def apply(self, found: Mapping[Key, Located]) -> dict[Key, Located]:
        """A step's tensors under their new keys, in the old order."""
        goals = {parts[0]: goal for goal, parts in self.sums.items()}
        used = {part for parts in self.sums.values() for part in parts}
        result: dict[Key, Located] = {}
        for key, source in found.items():
            if key in self.parts:
                result.update((goal, apart(source, columns)) for goal, columns in self.parts[key])
                continue
            parts = self.sums.get(goals[key], ()) if key in goals else ()
            if parts and all(part in found for part in parts):
                result[goals[key]] = _added([found[part] for part in parts])
            elif key not in self.dropped and not (key in used and parts == ()):
                result[self.renames.get(key, key)] = source
        return result


def bridged(
    mine: dict[Key, Located],
    theirs: dict[Key, Located],
    rules: Rules,
    steps: tuple[Sequence[Step], Sequence[Step]],
) -> tuple[dict[Key, Located], dict[Key, Located]]:
    """Both sides' tensors with fused ones taken apart; if the rules ask for it, with split ones added and
    differing paths made equal. ``steps`` are those in which they are."""
    plan_a, plan_b = plans(mine, theirs, rules, steps)
    return plan_a.apply(mine), plan_b.apply(theirs)


def plans(
    mine: Mapping[Key, Located],
    theirs: Mapping[Key, Located],
    rules: Rules,
    steps: tuple[Sequence[Step], Sequence[Step]],
) -> tuple[Plan, Plan]:
    """How A's and B's tensors correspond where one has in several what the other has in one."""
    found = bridge(mine, theirs, rules.sums) if rules.bridges else (Plan(), Plan())
    found[0].parts.update(parts_of(mine, theirs))
    found[1].parts.update(parts_of(theirs, mine))
    found[1].renames.update(aligned(mine, theirs, steps))
    return found


def bridge(
    mine: Mapping[Key, Located], theirs: Mapping[Key, Located], sums: Sequence[int]
) -> tuple[Plan, Plan]:
    """How A's and B's tensors of each call correspond where their paths or parts differ.

    ``sums`` are the output positions that one side keeps apart; without them nothing is added.
    """
    plans = Plan(), Plan()
    calls_a, calls_b = _by_call(mine), _by_call(theirs)
    for call in calls_a.keys() & calls_b.keys():
        sides = calls_a[call], calls_b[call]
        if len(sums) > 1:
            _add_parts(plans[0], sides[0], sides[1], sums)
            _add_parts(plans[1], sides[1], sides[0], sums)
        _pair_leftovers(plans, sides)
    return plans


def _by_call(found: Mapping[Key, Located]) -> dict[Call, dict[Key, Kind]]:
    calls: dict[Call, dict[Key, Kind]] = defaultdict(dict)
    for key, source in found.items():
        record = source.records[0]
        shape = record["shape"]
        floating = not str(record["dtype"]).startswith(_INTEGERS)
        calls[key[:4]][key] = (floating, int(shape[-1]) if shape else 0)
    return calls


def _add_parts(plan: Plan, split: Mapping[Key, Kind], whole: Mapping[Key, Kind], sums: Sequence[int]) -> None:
    """Where ``split`` has two tensors of a kind and ``whole`` one, note the sum, or the normed value."""
    _, module, _, direction = next(iter(split))[:4]
    if direction != "outputs":
        candidates = [key for key, kind in split.items() if kind[0]]
        parts = [each for each in _of_one_kind(candidates, split).values() if len(each) == len(sums)]
    else:
        chosen = [key for place in sums for key in split if key[4] == (place,)]
        parts = [chosen] if len(chosen) == len(sums) and len({split[key] for key in chosen}) == 1 else []
    for each in parts:
        goals = [key for key, kind in whole.items() if kind == split[each[0]]]
        if len(goals) != 1:
            continue
        if direction == "outputs" and _NORM.search(module.rpartition(".")[2]):
            plan.renames[each[0]] = goals[0]
            plan.dropped.update(each[1:])
        else:
            plan.sums[goals[0]] = tuple(each)


def _of_one_kind(keys: Iterable[Key], kinds: Mapping[Key, Kind]) -> dict[Kind, list[Key]]:
    groups: dict[Kind, list[Key]] = defaultdict(list)
    for key in keys:
        groups[kinds[key]].append(key)
    return groups


def _pair_leftovers(plans: tuple[Plan, Plan], sides: tuple[Mapping[Key, Kind], Mapping[Key, Kind]]) -> None:
    """Pair what has no counterpart of its own path, where its kind is the only one of that call."""
    goals = {*plans[0].sums, *plans[1].sums, *plans[0].renames.values(), *plans[1].renames.values()}
    free = []
    for plan, side, other in zip(plans, sides, reversed(sides), strict=True):
        taken = goals | plan.dropped | plan.renames.keys()
        taken |= {part for parts in plan.sums.values() for part in parts}
        alone = (key for key in side if key not in taken and other.get(key) != side[key])
        free.append(_of_one_kind(alone, side))
    for kind, keys in free[0].items():
        others = free[1].get(kind, [])
        if len(keys) == len(others) == 1:
            plans[0].renames[keys[0]] = others[0]
    for plan, side in zip(plans, sides, strict=True):
        for key in _hidden(plan, side, {*goals, *plans[0].renames.values()}):
            plan.renames[key] = (*key[:4], (*key[4], "unpaired"))


def _hidden(plan: Plan, side: Mapping[Key, Kind], goals: set[Key]) -> list[Key]:
    """Tensors whose path now belongs to another one: vLLM's positions, where Hugging Face has the state."""
    moved = {*plan.sums, *plan.renames.values()}
    used = {part for parts in plan.sums.values() for part in parts} | plan.renames.keys() | plan.dropped
    return [key for key in side if key in goals and key in moved and key not in used]


def _added(sources: Sequence[Located]) -> Located:
    names = tuple(name for source in sources for name in source.names)
    records = tuple(record for source in sources for record in source.records)
    shards = {name: each for source in sources for name, each in source.shards.items()}
    return Located(sources[0].step, names, records, sources[0].unshard, shards=shards)
