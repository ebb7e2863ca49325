"""Values that are no tensors: numbers, texts and None among what calls were given and returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...layout.names import PathKey, shown_module
from ...reader import Step
from ...record import Json
from .rules import Rules

_LONGEST = 40
_TENSOR = "tensor"
Path = tuple[PathKey, ...]
Sides = tuple[str, str]


def differing_values(steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules) -> list[str]:
    """A note on the values that differ between steps of one number, if any do.

    Only where both runs hold the structures in their ``step.json``: a file for each, as in `pt` runs, would
    cost more to read than the rest. Two implementations of a model take other values anyway.
    """
    if rules.bridges or rules.unshard:
        return []
    by_number = rules.by_number(steps_b)
    found = [
        place
        for step in steps_a
        if step.number in by_number
        for rank in step.ranks
        for place in _of_rank(step, by_number[step.number], rank, rules)
    ]
    if not found:
        return []
    count = "one place" if len(found) == 1 else f"{len(found)} places"
    return [f"values that are no tensors differ in {count}, first in {found[0]}"]


def _of_rank(a: Step, b: Step, rank: int, rules: Rules) -> Iterator[str]:
    packed = [step.documents.get(rank, {}).get("structures") for step in (a, b)]
    # Those of equal runs are settled here, as a whole.
    if None in packed or packed[0] == packed[1]:
        return
    theirs = b.structures(rank)
    identities = {
        str(record["name"]).split("/")[1]: (str(record["module"]), int(record["call"]))
        for record in a.documents[rank]["records"]
    }
    for name, structure in a.structures(rank).items():
        directory, _, file = name.rpartition("/")
        differing = list(_differing(structure, theirs[name])) if name in theirs else []
        if not differing:
            continue
        if directory not in identities:
            unstored = a.call(directory, rank)
            identities[directory] = unstored.module, unstored.index
        module, index = identities[directory]
        if not rules.wants(module):
            continue
        call = f" (call {index})" if index else ""
        for path, (mine, other) in differing:
            if rules.leaves_out((rank, module, index, file.removesuffix(".json"), path)):
                continue
            keys = "".join(f"[{key}]" for key in path)
            side = file.removesuffix(".json")
            where = f"{shown_module(module)}{call}, {side}{keys} of step {a.number}"
            yield f"{where}: {_short(mine)} against {_short(other)}"


def _differing(a: Json, b: Json) -> Iterator[tuple[Path, Sides]]:
    if a == b:
        return
    mine, theirs = dict(_leaves(a, ())), dict(_leaves(b, ()))
    for path in {**mine, **theirs}:
        sides = mine.get(path, "nothing"), theirs.get(path, "nothing")
        # A tensor that only one side has there is a result of its own.
        if sides[0] != sides[1] and _TENSOR not in sides:
            yield path, sides


def _leaves(node: Json, path: Path) -> Iterator[tuple[Path, str]]:
    """What is at each end of a structure, in words; of a tensor no more than that it is one."""
    items = node.get("items")
    if items is not None or "kwargs" in node:
        pairs: Any = items.items() if isinstance(items, Mapping) else enumerate(items or ())
        for key, child in (*pairs, *node.get("kwargs", {}).get("items", {}).items()):
            yield from _leaves(child, (*path, key))
    else:
        yield path, repr(node["value"]) if "value" in node else str(node["type"])


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
