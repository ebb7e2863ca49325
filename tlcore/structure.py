"""The shape of a call's arguments and results: frozen inside the hook, described later.

`freeze` runs on the model's thread and only notes what is there, with a `Slot` for each tensor.
`describe` runs on the pipeline's thread and builds the structure JSON and the logical names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .names import PathKey
from .record import Json
from .staging import Slot

_SCALARS = (bool, int, float, str)
_DEEPEST = 64


class Branch(NamedTuple):
    """A container as it stood: ``kind`` is ``tuple``, ``list`` or ``dict``; ``keys`` name the items."""

    kind: str
    cls: str | None
    keys: Sequence[PathKey]
    items: Sequence[Any]
    fields: tuple[str, ...] | None = None


class Opaque(NamedTuple):
    """An object that holds no tensor that tlcore can reach."""

    cls: str


NO_ITEMS = Branch("dict", None, (), ())


def class_name(value: object) -> str:
    """``package.module.Class`` of a value."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def freeze(value: Any, leaf: Callable[[torch.Tensor], Slot], seen: tuple[int, ...] = ()) -> Any:
    """Note a value's structure, calling ``leaf`` once for each tensor in it, in order."""
    cls = type(value)
    if cls is torch.Tensor or isinstance(value, torch.Tensor):
        return leaf(value)
    if value is None or cls in _SCALARS:
        return value
    if cls is dict and not value:
        return NO_ITEMS
    if id(value) in seen or len(seen) >= _DEEPEST:
        return Opaque("cycle" if id(value) in seen else "too deeply nested")
    inside = (*seen, id(value))
    if cls is tuple or cls is list:
        items = [freeze(item, leaf, inside) for item in value]
        return Branch("list" if cls is list else "tuple", None, range(len(items)), items)
    return _freeze_other(value, leaf, inside)


def _freeze_other(value: Any, leaf: Callable[[torch.Tensor], Slot], inside: tuple[int, ...]) -> Any:
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (tuple, list)):
        items = [freeze(item, leaf, inside) for item in value]
        kind = "list" if isinstance(value, list) else "tuple"
        return Branch(kind, class_name(value), range(len(items)), items, getattr(value, "_fields", None))
    if isinstance(value, Mapping):
        return _freeze_items(value, list(value.items()), leaf, inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
        return _freeze_items(value, pairs, leaf, inside)
    return Opaque(class_name(value))


def _freeze_items(
    value: object,
    pairs: Sequence[tuple[Any, Any]],
    leaf: Callable[[torch.Tensor], Slot],
    inside: tuple[int, ...],
) -> Branch:
    keys = [str(key) for key, _ in pairs]
    items = [freeze(item, leaf, inside) for _, item in pairs]
    return Branch("dict", None if type(value) is dict else class_name(value), keys, items)


def describe(node: Any, path: tuple[PathKey, ...], name: Callable[[tuple[PathKey, ...], Slot], None]) -> Json:
    """The structure JSON of a frozen node; ``name`` gives each staged slot its logical name."""
    if isinstance(node, Slot):
        return _describe_tensor(node, path, name)
    if isinstance(node, Branch):
        return _describe_branch(node, path, name)
    if isinstance(node, Opaque):
        return {"type": "object", "class": node.cls}
    if node is None:
        return {"type": "none"}
    if isinstance(node, float) and not math.isfinite(node):
        return {"type": "float", "value": str(node)}
    kind = next(scalar.__name__ for scalar in _SCALARS if isinstance(node, scalar))
    value = str.__str__(node) if isinstance(node, str) else node
    return {"type": kind, "value": value}


def _describe_tensor(
    slot: Slot, path: tuple[PathKey, ...], name: Callable[[tuple[PathKey, ...], Slot], None]
) -> Json:
    document: Json = {
        "type": "tensor",
        "shape": list(slot.shape),
        "dtype": str(slot.dtype),
        "numel": math.prod(slot.shape),
        "device": slot.device,
    }
    reason = slot.skipped or slot.failed or ("queue full" if slot.dropped else None)
    if reason is None:
        name(path, slot)
        document["file"] = f"{slot.name}.pt"
    else:
        document["skipped"] = reason
    return document


def _describe_branch(
    node: Branch, path: tuple[PathKey, ...], name: Callable[[tuple[PathKey, ...], Slot], None]
) -> Json:
    document: Json = {"type": node.kind}
    if node.cls is not None:
        document["class"] = node.cls
    if node.fields is not None:
        document["fields"] = list(node.fields)
    children = [describe(item, (*path, key), name) for key, item in zip(node.keys, node.items, strict=True)]
    if node.kind == "dict":
        document["items"] = _unique_keys(node.keys, children)
    else:
        document["items"] = children
    return document


def _unique_keys(keys: Sequence[PathKey], children: Sequence[Json]) -> dict[str, Json]:
    items: dict[str, Json] = {}
    for key, child in zip(keys, children, strict=True):
        # `{1: a, "1": b}` is a legal dictionary; JSON knows only the string.
        label, n = str(key), 2
        while label in items:
            label, n = f"{key}~{n}", n + 1
        items[label] = child
    return items


__all__ = ["Branch", "Opaque", "class_name", "describe", "freeze"]
