"""Runs whose ranks do not tell how they share the model, as of other tools, against a run of another layout.

Each of these ranks is held against the other run: what all ranks have is compared on each of them, and what
each has a part of is joined where the other run's tensor shows that it lies side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ...reader import Run, Step
from ..results import TensorResult
from .fused import FUSED, HALVES
from .pairs import Key, Located, Shards
from .rules import Rules

_Tensor = tuple[object, ...]


def spread(rules: Rules, runs: tuple[Run, Run], steps: tuple[Sequence[Step], Sequence[Step]]) -> Rules:
    """The rules for runs of which the one of more ranks has each of them held against the other."""
    sides = [side for side, run in enumerate(runs) if run.is_foreign and run.world_size > 1]
    if not sides or not rules.unshard:
        return rules
    side = max(sides, key=lambda each: runs[each].world_size)
    ranks = tuple(sorted({rank for step in steps[side] for rank in step.ranks}))
    if len(ranks) < 2:
        return rules
    return replace(rules, spread=side, ranks=ranks, both_spread=len(sides) == 2)


def with_shards_joined(
    found: Mapping[Key, Located], whole: Mapping[Key, Located], ranks: Sequence[int]
) -> dict[Key, Located]:
    """Tensors of several ranks, those joined that lie side by side in the other run's ``whole`` ones."""
    by_tensor: dict[_Tensor, list[Key]] = defaultdict(list)
    for key in found:
        by_tensor[key[1:]].append(key)
    others: dict[_Tensor, dict[Key, Located]] = defaultdict(dict)
    for key, source in whole.items():
        if key[0] == ranks[0]:
            others[key[1:4]][key] = source
    gone: set[Key] = set()
    joined: dict[Key, Located] = {}
    for keys in by_tensor.values():
        sources = [found[key] for key in sorted(keys)]
        widths = _widths(min(keys), sources, others) if len(keys) > 1 else None
        if widths is not None:
            joined[min(keys)] = joined_shards(sources, widths)
            gone.update(keys)
    return {key: joined.get(key, source) for key, source in found.items() if key in joined or key not in gone}


def _widths(
    key: Key, sources: Sequence[Located], others: Mapping[_Tensor, Mapping[Key, Located]]
) -> tuple[int, ...] | None:
    """How wide what each rank has side by side is; None where that makes up no tensor."""
    shapes = [tuple(each.records[0]["shape"]) for each in sources]
    if not shapes[0] or len(set(shapes)) > 1 or any(each.by is not None for each in sources):
        return None
    count, width = len(sources), shapes[0][-1]
    for parts in _wholes(key, others):
        if sum(parts) == count * width and all(each % count == 0 for each in parts):
            return tuple(each // count for each in parts)
    return None


def _wholes(key: Key, others: Mapping[_Tensor, Mapping[Key, Located]]) -> Iterator[tuple[int, ...]]:
    """The last extents of what the other run has of a call's side, taken apart as ranks have it."""
    _, module, call, direction, _ = key
    outer, dot, name = module.rpartition(".")
    same = others.get((module, call, direction), {})
    # Arguments and results may be told by other names.
    for width in dict.fromkeys(_last(same[each]) for each in ([key] if key in same else same)):
        if direction == "outputs" and name in HALVES:
            yield (width // 2, width - width // 2)
        elif direction != "outputs" or name not in FUSED:
            yield (width,)
    singles = [others.get((f"{outer}{dot}{each}", call, direction), {}) for each in FUSED.get(name, ())]
    if direction == "outputs" and singles and all(len(each) == 1 for each in singles):
        yield tuple(_last(source) for each in singles for source in each.values())


def _last(source: Located) -> int:
    shape = source.records[0]["shape"]
    return int(shape[-1]) if shape else 0


def joined_shards(sources: Sequence[Located], widths: tuple[int, ...]) -> Located:
    """What several ranks have of a tensor as one, each with as much of what is side by side in it."""
    first = sources[0]
    record = first.records[0]
    changed = {
        "shape": [*record["shape"][:-1], len(sources) * record["shape"][-1]],
        "bytes": sum(int(each.records[0]["bytes"]) for each in sources),
        "hash": None,
    }
    shards = Shards(tuple(each.names[0] for each in sources), widths)
    return replace(first, records=({**record, **changed},), shards={first.names[0]: shards})


def told_once(missing: Sequence[TensorResult], rules: Rules) -> list[TensorResult]:
    """Of what the other run has, that which no rank has, and once."""
    if rules.spread is None:
        return list(missing)
    other = 1 - rules.spread
    ranks: dict[tuple[str | None, str | None], set[int]] = defaultdict(set)
    for each in missing:
        ranks[each.names[other], each.request].add(each.rank)
    result = []
    for each in missing:
        lacking = ranks[each.names[other], each.request]
        if each.names[other] is None or (len(lacking) == len(rules.ranks) and each.rank == rules.ranks[0]):
            result.append(each)
    return result


def spread_note(rules: Rules) -> list[str]:
    """What to know of ranks that were held against another run each."""
    if rules.spread is None:
        return []
    label, other = "AB"[rules.spread], "AB"[1 - rules.spread]
    if rules.both_spread:
        return [
            "ranks of both runs are held against one another, since nothing tells how these share the model:"
            " parts are joined where a run tells how, or where their last dimensions make up as much in both;"
            " what ranks have summands of differs"
        ]
    return [
        f"{label}'s ranks {', '.join(map(str, rules.ranks))} are each held against {other}; parts are joined"
        f" where {label} tells how, or where their last dimensions make up {other}'s"
    ]
