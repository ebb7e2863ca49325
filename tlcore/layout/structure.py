"""The shape of a call's arguments and results: sketched inside the hook, described later.

`freeze` runs on the model's thread. It notes containers and classes in a *tree spec*, a hashable value that
is the same for every call of the same structure, and hands the leaves over in order: each tensor, and each
number or string. `describe` puts tree spec and leaves together again as the structure JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .names import PathKey
from .templates import Json

TreeSpec = Hashable
Scalar = bool | int | float | str

TENSOR = "tensor"
SCALAR = "scalar"
NONE = "none"
_TUPLE, _LIST, _DICT = "tuple", "list", "dict"
NO_ITEMS: TreeSpec = (_DICT, (), ())
_SCALARS = (bool, int, float, str)
_DEEPEST = 64
_Tensor = torch.Tensor


class Leaves(Protocol):
    """Who takes the leaves of a structure, in order."""

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take a tensor."""
        ...

    def scalar(self, value: Scalar) -> None:
        """Take a number or string."""
        ...


class Branch(NamedTuple):
    """The tree spec of a container that is not just a tuple, list or dictionary."""

    kind: str
    cls: str
    keys: tuple[PathKey, ...] | None
    items: tuple[TreeSpec, ...]
    fields: tuple[str, ...] | None = None


class Opaque(NamedTuple):
    """The tree spec of an object that holds no tensor that tlcore can reach."""

    cls: str


def class_name(value: object) -> str:
    """``package.module.Class`` of a value."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def flatten(value: Any, leaves: Leaves, seen: tuple[int, ...] = ()) -> TreeSpec:
    """The tree spec of a value, whose leaves are handed over once each."""
    cls = type(value)
    if cls is _Tensor or isinstance(value, _Tensor):
        leaves.tensor(value)
        return TENSOR
    if value is None:
        return NONE
    if cls in _SCALARS:
        leaves.scalar(value)
        return SCALAR
    if cls is dict and not value:
        return NO_ITEMS
    if id(value) in seen or len(seen) >= _DEEPEST:
        return Opaque("cycle" if id(value) in seen else "too deeply nested")
    inside = (*seen, id(value))
    if cls is tuple or cls is list:
        items: list[TreeSpec] = []
        for item in value:
            # What arguments mostly are, without a call each.
            if type(item) is _Tensor:
                leaves.tensor(item)
                items.append(TENSOR)
            elif item is None:
                items.append(NONE)
            else:
                items.append(flatten(item, leaves, inside))
        return (_LIST if cls is list else _TUPLE, tuple(items))
    return _flatten_other(value, leaves, inside)


def _flatten_other(value: Any, leaves: Leaves, inside: tuple[int, ...]) -> TreeSpec:
    if isinstance(value, _SCALARS):
        leaves.scalar(value)
        return SCALAR
    if isinstance(value, (tuple, list)):
        items = tuple([flatten(item, leaves, inside) for item in value])
        kind = _LIST if isinstance(value, list) else _TUPLE
        return Branch(kind, class_name(value), None, items, getattr(value, "_fields", None))
    if isinstance(value, Mapping):
        return _flatten_items(value, list(value.items()), leaves, inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
        return _flatten_items(value, pairs, leaves, inside)
    return Opaque(class_name(value))


def _flatten_items(
    value: object, pairs: Sequence[tuple[Any, Any]], leaves: Leaves, inside: tuple[int, ...]
) -> TreeSpec:
    keys = tuple([str(key) for key, _ in pairs])
    items = tuple([flatten(item, leaves, inside) for _, item in pairs])
    if type(value) is dict:
        return (_DICT, keys, items)
    return Branch(_DICT, class_name(value), keys, items)


def count_leaves(treespec: TreeSpec) -> tuple[int, int]:
    """How many tensors and how many scalars a tree spec stands for."""
    if treespec in (TENSOR, SCALAR):
        return int(treespec == TENSOR), int(treespec == SCALAR)
    if isinstance(treespec, (str, Opaque)):
        return 0, 0
    counts = [count_leaves(item) for item in _parts(treespec).items]
    return sum(tensors for tensors, _ in counts), sum(scalars for _, scalars in counts)


def describe(
    treespec: TreeSpec,
    path: tuple[PathKey, ...],
    tensor: Callable[[tuple[PathKey, ...]], Json],
    scalars: Iterator[Scalar],
) -> Json:
    """The structure JSON of a tree spec; ``tensor`` describes the next tensor, which lies at a path."""
    if treespec == TENSOR:
        return tensor(path)
    if treespec == NONE:
        return {"type": "none"}
    if treespec == SCALAR:
        return _describe_scalar(next(scalars))
    if isinstance(treespec, Opaque):
        return {"type": "object", "class": treespec.cls}
    branch = _parts(treespec)
    document: Json = {"type": branch.kind}
    if branch.cls:
        document["class"] = branch.cls
    if branch.fields is not None:
        document["fields"] = list(branch.fields)
    keys = branch.keys if branch.keys is not None else range(len(branch.items))
    pairs = zip(keys, branch.items, strict=True)
    children = [describe(item, (*path, key), tensor, scalars) for key, item in pairs]
    document["items"] = children if branch.keys is None else _unique_keys(branch.keys, children)
    return document


def _parts(treespec: Any) -> Branch:
    if isinstance(treespec, Branch):
        return treespec
    kind, *keys, items = treespec
    return Branch(kind, "", keys[0] if keys else None, items)


def _describe_scalar(value: Scalar) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "float", "value": str(value)}
    kind = next(scalar.__name__ for scalar in _SCALARS if isinstance(value, scalar))
    return {"type": kind, "value": str.__str__(value) if isinstance(value, str) else value}


def _unique_keys(keys: Sequence[PathKey], children: Sequence[Json]) -> dict[str, Json]:
    items: dict[str, Json] = {}
    for key, child in zip(keys, children, strict=True):
        # `{1: a, "1": b}` is a legal dictionary; JSON knows only the string.
        label, n = str(key), 2
        while label in items:
            label, n = f"{key}~{n}", n + 1
        items[label] = child
    return items
