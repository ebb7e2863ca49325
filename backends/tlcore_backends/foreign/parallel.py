"""How a dump's ranks share the model, as some tools tell, in the words of ``run.json`` and ``step.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tlcore.record import Json

# What a tool calls the groups of ranks that `run.json` has.
_GROUPS = {"tp": ("tp",), "pcp": ("attn_cp", "cp"), "pp": ("pp",), "dp": ()}
_DIMENSION = re.compile(r"[^\[\]]+(?:\[([^\[\]]*)\])?")
_SPLIT_BY_TENSOR = re.compile(r"(?:attn_|moe_)?tp(?::(\w+))?")


def places(told: Mapping[int, Any], world_size: int) -> list[Json] | None:
    """The entries of ``ranks`` from what is told of each rank; None where that is not all."""
    found = [_place(rank, told.get(rank)) for rank in range(world_size)]
    return None if None in found or len(told) != world_size else [each for each in found if each is not None]


def _place(rank: int, told: Any) -> Json | None:
    if not isinstance(told, Mapping):
        return None
    place: Json = {"rank": rank}
    for group, names in _GROUPS.items():
        name = next((each for each in names if f"{each}_size" in told), None)
        own, size = (0, 1) if name is None else (told.get(f"{name}_rank"), told.get(f"{name}_size"))
        if type(own) is not int or type(size) is not int or not 0 <= own < size:
            return None
        place |= {f"{group}_rank": own, f"{group}_size": size}
    return place


def part_of(dims: Any, shape: Sequence[int]) -> Json | None:
    """How a tensor is a part of one that tensor-parallel ranks share, by SGLang's words for its dimensions.

    ``t h[tp]``: the last one is apart; ``h[tp:partial]``: the ranks' values are to be added. None for one
    that is whole, and where that is not told.
    """
    if not isinstance(dims, str):
        return None
    words = dims.partition("#")[0].split()
    if len(words) != len(shape):
        return None
    for place, word in enumerate(words):
        named = _DIMENSION.fullmatch(word)
        if named is None or named[1] is None:
            continue
        split = _SPLIT_BY_TENSOR.fullmatch(named[1].strip())
        if split is None:
            return {"unknown": f"its dimension {word} is shared otherwise than by tensor parallelism"}
        if split[1] not in (None, "natural", "partial"):
            return {"unknown": f"its dimension {word} is shared in an order that is not known"}
        return {"sum": True} if split[1] == "partial" else {"dim": place}
    return None
