"""From the tensors that a foreign dump holds to the documents of a step, as the reader takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from tlcore.layout.directions import is_gradient
from tlcore.layout.dtypes import item_size
from tlcore.layout.names import PathKey, call_dir, stem, step_dir, unique
from tlcore.ledger import Counts
from tlcore.record import LAYOUT_VERSION, Json

# Positions of arguments or results beyond this are names, not places in a tuple.
_MOST_PLACES = 4096
UNKNOWN_HASH = ""


class Found(NamedTuple):
    """One tensor of a dump: what it is of, how it looks, and the ``place`` by which the source reads it.

    One that cannot be read has ``skipped``, the reason, in place of a ``place``, and no dtype where
    even that is not known. ``part`` says how a rank's part of a tensor is joined, as in ``step.json``.
    """

    module: str
    direction: str
    path: tuple[PathKey, ...]
    dtype: str = ""
    shape: tuple[int, ...] = ()
    place: Json | None = None
    skipped: str | None = None
    call: int = 0
    device: str = "cpu"
    part: Json | None = None


_DIGITS = re.compile(r"(\d+)")
_FIRST = re.compile(r"embed|wte|tok_emb", re.IGNORECASE)


def in_model_order(found: Iterable[Found]) -> list[Found]:
    """The tensors of a dump without order, as a model would mostly have run: embeddings, layers, the rest.

    A module's arguments come before what is within it, its results after that.
    """

    def place(each: Found) -> tuple[Any, ...]:
        kind = 0 if _FIRST.search(each.module) else 1 if _DIGITS.search(each.module) else 2
        # Behind the names of all modules within it.
        end: list[tuple[Any, ...]] = [(2,)] if each.direction == "outputs" else []
        return kind, [_numbered_part(part) for part in each.module.split(".")] + end

    return sorted(found, key=place)


@lru_cache(1024)
def _numbered_part(part: str) -> tuple[Any, ...]:
    """How a part of a name sorts: numbers by their values."""
    if part.isdecimal():
        return 0, int(part[:18])
    return 1, [int(each[:18]) if place % 2 else each for place, each in enumerate(_DIGITS.split(part))]


class Structures:
    """The structure documents of a step by ``<call>/<direction>.json``, made when they are asked for."""

    def __init__(self) -> None:
        self._sides: dict[tuple[str, str], list[tuple[Found, str]]] = {}

    def add(self, directory: str, found: Found, name: str) -> None:
        """A tensor that is called ``name``, of a call with this directory."""
        self._sides.setdefault((directory, found.direction), []).append((found, name))

    @property
    def names(self) -> list[str]:
        """Those of all documents."""
        return [f"{directory}/{direction}.json" for directory, direction in self._sides]

    def get(self, name: str) -> Json | None:
        """One of them."""
        directory, _, file = name.rpartition("/")
        direction = file.removesuffix(".json")
        tensors = self._sides.get((directory, direction))
        return (
            None
            if tensors is None
            else _structure(direction, [(each, _node(each, own)) for each, own in tensors])
        )


def step_document(
    step: int,
    rank: int,
    found: Sequence[Found],
    rows: Sequence[Json] | None = None,
    calls: Sequence[tuple[str, int]] | None = None,
) -> tuple[Json, Structures]:
    """A step's document (records, calls and ledger of the tensors in their order), and its structures.

    ``calls`` are modules and call numbers in order of entry; without it that is guessed from the order
    of the tensors, a module before those within it.
    """
    entries = _numbered(found)
    modules = frozenset(each.module for each in entries)
    taken: set[str] = set()
    records: list[Json] = []
    structures = Structures()
    counts, begin = Counts(), f"{step_dir(step)}/"
    for each in entries:
        directory = call_dir(each.module, each.call, modules)
        # Most modules take and give alike.
        plain = f"{begin}{directory}/{_stem(each.direction, each.path, each.device, rank)}"
        name = unique(plain, taken)
        structures.add(directory, each, name)
        size = prod(each.shape) * (item_size(each.dtype) or 0)
        _count(counts, each, size)
        if each.skipped is None:
            records.append(_record(each, name, size))
    document: Json = {
        "layout": LAYOUT_VERSION,
        "step": step,
        "rank": rank,
        "started": "",
        "ended": "",
        "ledger": counts.to_json(),
        "calls": [call_dir(module, call, modules) for module, call in calls or _entered(entries)],
        "records": records,
    }
    if rows is not None:
        document["rows"] = list(rows)
    return document, structures


_stem = lru_cache(4096)(stem)


def sharding_of(found: Sequence[Found], place: Json) -> Json | None:
    """The entry of a step's document that says which tensors are parts, for a rank at a ``place``."""
    if place["tp_size"] == 1 or all(each.part is None for each in found):
        return None
    tensors: Json = {}
    for each in found:
        if each.part is not None:
            side = tensors.setdefault(each.module, {}).setdefault(each.direction, {})
            side["/".join(map(str, each.path))] = each.part
    return {"tp_rank": place["tp_rank"], "tp_size": place["tp_size"], "tensors": tensors}


def _numbered(found: Iterable[Found]) -> list[Found]:
    """The tensors, with further calls where one call would have the same tensor twice."""
    seen: set[tuple[Any, ...]] = set()
    entries = []
    for each in found:
        entry = each
        while (key := (entry.module, entry.call, entry.direction, *map(str, entry.path))) in seen:
            entry = entry._replace(call=entry.call + 1)
        seen.add(key)
        entries.append(entry)
    return entries


def _record(each: Found, name: str, size: int) -> Json:
    return {
        "name": name,
        "module": each.module,
        "call": each.call,
        "direction": each.direction,
        "path": list(each.path),
        "dtype": each.dtype,
        "shape": list(each.shape),
        "device": each.device,
        "bytes": size,
        "hash": UNKNOWN_HASH,
        "place": each.place,
    }


def _node(each: Found, name: str) -> Json:
    if not each.dtype:
        return {"type": "object", "class": "tensor", "skipped": each.skipped or ""}
    where = {"file": f"{name}.pt"} if each.skipped is None else {"name": name, "skipped": each.skipped}
    return {
        "type": "tensor",
        "shape": list(each.shape),
        "dtype": f"torch.{each.dtype}",
        "numel": prod(each.shape),
        "device": each.device,
        **where,
    }


def _count(counts: Counts, each: Found, size: int) -> None:
    counts.captured += 1
    counts.bytes_captured += size
    if each.skipped is None:
        counts.stored += 1
        counts.bytes_stored += size
    else:
        counts.skipped += 1
        counts.reasons[each.skipped] += 1


def _entered(entries: Sequence[Found]) -> list[tuple[str, int]]:
    """The calls in order of entry. Results come in that of return, a child's before its parent's."""
    order = dict.fromkeys((each.module, each.call) for each in entries)
    # One entry is enough for what lies within; further calls come in their own turn.
    first: dict[str, tuple[str, int]] = {}
    for each in order:
        first.setdefault(each[0], each)
    result: dict[tuple[str, int], None] = {}
    for each in order:
        module = each[0]
        for outer in _outer(module) if module else ():
            if outer in first:
                result.setdefault(first[outer])
        result.setdefault(each)
    return list(result)


@lru_cache(4096)
def _outer(module: str) -> tuple[str, ...]:
    """The names of all modules around one, the model itself first."""
    parts = module.split(".")
    return ("", *(".".join(parts[:end]) for end in range(1, len(parts))))


def _structure(direction: str, tensors: Sequence[tuple[Found, Json]]) -> Json:
    """The structure document of one side of a call, from the paths of its tensors."""
    arguments = direction in ("inputs", "post_fwd_inputs") or (
        is_gradient(direction) and direction.startswith("grad_inputs")
    )
    if not arguments:
        return _tree([(each.path, node) for each, node in tensors])
    args = [(each.path, node) for each, node in tensors if each.path and isinstance(each.path[0], int)]
    kwargs = [(each.path, node) for each, node in tensors if each.path and isinstance(each.path[0], str)]
    if bare := [node for each, node in tensors if not each.path]:
        args = [*(((place,), node) for place, node in enumerate(bare)), *args]
    found: Json = _tree(args) if args else {"type": "tuple", "items": []}
    if found["type"] != "tuple":
        found = {"type": "tuple", "items": list(found["items"].values())}
    items = _tree(kwargs)["items"] if kwargs else {}
    return {**found, "kwargs": {"type": "dict", "items": items}}


def _tree(tensors: Sequence[tuple[tuple[PathKey, ...], Json]]) -> Json:
    if len(tensors) == 1:
        path, node = tensors[0]
        if not path:
            return node
        if path == (0,):
            # Most calls take and give one.
            return {"type": "tuple", "items": [node]}
    below: dict[PathKey, list[tuple[tuple[PathKey, ...], Json]]] = {}
    for path, node in tensors:
        below.setdefault(path[0] if path else "", []).append((path[1:], node))
    children = {key: _tree(each) for key, each in below.items()}
    places = [key for key in children if isinstance(key, int)]
    if len(places) == len(children) and max(places) < _MOST_PLACES:
        absent: Json = {"type": "object", "class": "what the dump has not"}
        return {"type": "tuple", "items": [children.get(place, absent) for place in range(max(places) + 1)]}
    taken: set[str] = set()
    return {"type": "dict", "items": {unique(str(key), taken): each for key, each in children.items()}}
