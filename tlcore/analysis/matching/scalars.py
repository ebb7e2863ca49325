"""Values that are no tensors: numbers, texts and None among what calls were given and returned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...layout.names import PathKey, shown_module
from ...reader import Step
from ...record import Json
from .rules import Rules

_LONGEST = 40
# Files of `pt` that are read for it, at most: two or three seconds' worth.
MOST_FILES = 50_000
_TENSOR = "tensor"
Path = tuple[PathKey, ...]
Sides = tuple[str, str]


def differing_values(steps_a: Sequence[Step], steps_b: Sequence[Step], rules: Rules) -> list[str]:
    """A note on the values that differ between steps of one number, if any do.

    Two implementations of a model take other values anyway.
    """
    if rules.bridges or rules.unshard:
        return []
    by_number = rules.by_number(steps_b)
    found: list[str] = []
    notes: list[str] = []
    files = 0
    there = [each for each in steps_a if each.number in by_number]
    for step, rank in ((each, rank) for each in there for rank in each.ranks):
        other = by_number[step.number]
        if not (_tells(step, rank) and _tells(other, rank)) or _has_the_same(step, other, rank):
            continue
        files += sum(_files(each, rank) for each in (step, other))
        if files > MOST_FILES:
            notes.append(f"values that are no tensors were compared before step {step.number} alone")
            break
        found += _of_rank(step, other, rank, rules)
    if found:
        count = "one place" if len(found) == 1 else f"{len(found)} places"
        notes.insert(0, f"values that are no tensors differ in {count}, first in {found[0]}")
    return notes


def _of_rank(a: Step, b: Step, rank: int, rules: Rules) -> Iterator[str]:
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


def _tells(step: Step, rank: int) -> bool:
    """Whether the structures are at hand: a request for each file of `pt` would cost more than the rest."""
    document = step.documents.get(rank, {})
    return "structures" in document or ("structures_hash" in document and step.stored.is_local)


def _files(step: Step, rank: int) -> int:
    """In how many files they lie."""
    packed = "structures" in step.documents[rank]
    return 0 if packed else len(step.stored.structure_names(step.number, rank))


def _has_the_same(a: Step, b: Step, rank: int) -> bool:
    """Whether all is the same, as it is in equal runs, without looking at each."""
    first, second = a.documents[rank], b.documents[rank]
    keys = [key for key in ("structures", "structures_hash") if key in first and key in second]
    return any(first[key] == second[key] for key in keys)


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
        for key, child in (*_pairs(items), *_pairs(node.get("kwargs", {}).get("items"))):
            yield from _leaves(child, (*path, key))
    else:
        yield path, repr(node["value"]) if "value" in node else str(node["type"])


def _pairs(items: Any) -> Iterable[tuple[PathKey, Json]]:
    return items.items() if isinstance(items, Mapping) else enumerate(items or ())


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
