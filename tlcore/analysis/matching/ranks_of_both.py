"""Two runs of several ranks each, of which neither tells how they share the model, and which are not as many.

Each tensor's ranks are held against those of the other run, so that none goes unseen, whichever run has more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...reader import Step
from .fused import FUSED, HALVES
from .pairs import Key, Located
from .ranks import joined_shards

_Tensor = tuple[object, ...]
_Found = dict[Key, Located]
# The ranks that a tensor counts as, with the rank whose it is, and the widths of parts that are joined.
_Plan = tuple[Mapping[int, int], tuple[int, ...] | None]


def held_by_ranks(spread: _Found, other: _Found, ranks: Sequence[int]) -> tuple[_Found, _Found]:
    """Both sides' tensors under the ranks by which they are compared; ``ranks`` are those of ``spread``.

    What each rank has a part of is joined on both sides where the last dimensions make up as much.
    """
    one, two = _by_tensor(spread), _by_tensor(other)
    plans = {
        tensor: _plan(tensor, one.get(tensor, {}), two.get(tensor, {}), ranks) for tensor in {**one, **two}
    }
    mine = {tensor: plan[0] for tensor, plan in plans.items()}
    theirs = {tensor: plan[1] for tensor, plan in plans.items()}
    return _planned(spread, one, mine), _planned(other, two, theirs)


def held_by_ranks_of_all(
    spread: list[tuple[Step, _Found]], other: list[tuple[Step, _Found]], ranks: Sequence[int]
) -> None:
    """The same for the steps of two runs, in place: whichever step of the other one has the same tensors."""
    alls: list[_Found] = [{}, {}]
    for merged, steps in zip(alls, (spread, other), strict=True):
        for _, found in steps:
            for key, source in found.items():
                merged.setdefault(key, source)
    spread[:] = [(step, held_by_ranks(found, alls[1], ranks)[0]) for step, found in spread]
    other[:] = [(step, held_by_ranks(alls[0], found, ranks)[1]) for step, found in other]


def _by_tensor(found: Mapping[Key, Located]) -> dict[_Tensor, dict[int, Located]]:
    held: dict[_Tensor, dict[int, Located]] = defaultdict(dict)
    for key, source in found.items():
        held[key[1:]][key[0]] = source
    return dict(held)


def _plan(
    tensor: _Tensor, mine: Mapping[int, Located], theirs: Mapping[int, Located], ranks: Sequence[int]
) -> tuple[_Plan, _Plan]:
    one, two = sorted(mine), sorted(theirs)
    if not mine or not theirs or len(two) == 1:
        return ({rank: rank for rank in one}, None), (_spread_over(two, ranks), None)
    widths = _widths(tensor, [mine[rank] for rank in one], [theirs[rank] for rank in two])
    if widths is not None:
        return ({ranks[0]: one[0]}, widths[0]), ({ranks[0]: two[0]}, widths[1])
    most = one if len(one) >= len(two) else two
    return (_spread_over(one, most), None), (_spread_over(two, most), None)


def _spread_over(held: Sequence[int], ranks: Sequence[int]) -> dict[int, int]:
    """Which of those that have a tensor each of some ranks is held against: neighbours the same one."""
    return {rank: held[place * len(held) // len(ranks)] for place, rank in enumerate(ranks)} if held else {}


def _widths(
    tensor: _Tensor, mine: Sequence[Located], theirs: Sequence[Located]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How wide what lies side by side in each rank's part is, on both sides; None for all but such parts."""
    shapes = [{tuple(each.records[0]["shape"]) for each in side} for side in (mine, theirs)]
    if any(len(side) > 1 or () in side for side in shapes) or any(each.by for each in (*mine, *theirs)):
        return None
    one, two = (next(iter(side)) for side in shapes)
    if one[:-1] != two[:-1] or one[-1] == two[-1] or one[-1] * len(mine) != two[-1] * len(theirs):
        return None
    name = str(tensor[0]).rpartition(".")[2]
    if tensor[2] != "outputs" or name not in FUSED:
        return (one[-1],), (two[-1],)
    if name not in HALVES or one[-1] % 2 or two[-1] % 2:
        return None
    return (one[-1] // 2,) * 2, (two[-1] // 2,) * 2


def _planned(
    found: Mapping[Key, Located],
    held: Mapping[_Tensor, Mapping[int, Located]],
    plans: Mapping[_Tensor, _Plan],
) -> _Found:
    result: _Found = {}
    done: set[_Tensor] = set()
    for key in found:
        tensor = key[1:]
        if tensor in done:
            continue
        done.add(tensor)
        by, widths = plans[tensor]
        for rank, whose in by.items():
            source = held[tensor][whose]
            if widths is not None and len(held[tensor]) > 1:
                source = joined_shards([held[tensor][each] for each in sorted(held[tensor])], widths)
            # Objects of their own: their order in the run is known by them.
            placed: Key = (rank, *key[1:])
            result[placed] = replace(source)
    return result
