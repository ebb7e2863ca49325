"""What one rank of an engine has to know of the others', so that a row is injected into all of them or none.

The ranks do not talk about it: each tells from the run that is injected what the others will find there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..layout.names import PathKey
from ..reader.request import Request
from ..reader.unshard import Places, group_of
from .filters.modules import ModuleFilter


class Group(NamedTuple):
    """Ranks of one engine of the run that is injected.

    ``same`` compute a stage together, first the one that stands where the injecting rank does; ``before``
    are those of the stages before it.
    """

    same: Sequence[int]
    before: Sequence[int]

    def names(self, other: Request, directory: str, path: tuple[PathKey, ...]) -> list[str]:
        """The results of a call of ``same``, the first one's first.

        Empty where that has none, or another one had one that was not stored.
        """
        found = {rank: other.outputs.get((directory, path, rank)) for rank in self.same}
        own = found[self.same[0]] if self.same else None
        missed = [rank for rank, name in found.items() if name is None]
        if own is None or any(other.left_out(directory, path, rank) for rank in missed):
            return []
        return [name for name in found.values() if name is not None]

    def names_before(self, other: Request, selects: ModuleFilter) -> list[str]:
        """The results of the stages before that are injected, those of all rows of a step."""
        return [
            name
            for (_, _, rank), name in other.outputs.items()
            if rank in self.before and not other.is_of_items(name) and _selected(other, name, selects)
        ]


NO_GROUP = Group((), ())


def _selected(other: Request, name: str, selects: ModuleFilter) -> bool:
    module, call = other.call_of(name)
    calls = selects.calls(module)
    return calls == "all" or (calls is not None and call in calls)


def groups_of(places: Places, rank: int) -> list[Group]:
    """The group of ``rank``; behind it those of other engines, any of which may have had a request."""
    own = places.get(rank, {})
    keys = [f"{group}_rank" for group in ("tp", "pcp", "pp") if own]
    alike = [each for each, place in places.items() if all(place[key] == own[key] for key in keys)]
    return [_group(places, each) for each in dict.fromkeys((rank, *alike))]


def _group(places: Places, rank: int) -> Group:
    own = places.get(rank)
    same = list(dict.fromkeys((rank, *group_of(places, rank))))
    if own is None:
        return Group(same, ())
    engine = [each for each, place in places.items() if place["dp_rank"] == own["dp_rank"]]
    return Group(same, [each for each in engine if places[each]["pp_rank"] < own["pp_rank"]])
