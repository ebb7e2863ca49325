"""The shape of a call's arguments and results: sketched inside the hook, described later.

`freeze` runs on the model's thread. It notes containers and classes in a *tree spec*, a hashable value that
is the same for every call of the same structure, and hands the leaves over in order: each tensor, and each
number or string. `describe` puts tree spec and leaves together again as the structure JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..hotpath import objects
from ..hotpath.held_tensors import extras_of, hides_tensor, holds_tensor, is_of_tensors
from ..hotpath.objects import Kind, kind_of
from ..hotpath.objects import class_name as class_name
from .names import PathKey
from .templates import Json

TreeSpec = Hashable
Scalar = bool | int | float | str

TENSOR = "tensor"
SCALAR = "scalar"
NONE = "none"
OBJECT = "object"
# Why something is not looked into, beside what `objects` calls its kind.
TOO_DEEP, TOO_MANY = "nested too deep", "too many objects in it"
SEEN = "cache: stored where it first came in this step"
_TUPLE, _LIST, _DICT = "tuple", "list", "dict"
NO_ITEMS: TreeSpec = (_DICT, (), ())
_SCALARS = (bool, int, float, str)
_DEEPEST = 64
_MOST_OBJECTS = 4096
_Tensor = torch.Tensor


class Leaves(Protocol):
    """Who takes the leaves of a structure, in order."""

    @property
    def opens(self) -> Container[str]:
        """Which kinds of objects are looked into that are not by default: ``cache``."""
        ...

    def tensor(self, tensor: torch.Tensor) -> None:
        """Take a tensor."""
        ...

    def scalar(self, value: Scalar) -> None:
        """Take a number or string."""
        ...

    def unopened(self, value: Any, reason: str) -> None:
        """Count what may hold tensors and is not looked into."""
        ...

    def first(self, tensor: torch.Tensor) -> bool:
        """Whether a cache's tensor has not been taken in this step as it stands now."""
        ...


class KeptLeaves:
    """Keeps the leaves of a structure as they are; what is not looked into is counted elsewhere."""

    opens: Container[str] = ()

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.scalars: list[Scalar] = []

    def tensor(self, tensor: torch.Tensor) -> None:
        """Keep a tensor."""
        self.tensors.append(tensor)

    def scalar(self, value: Scalar) -> None:
        """Keep a number or string."""
        self.scalars.append(value)

    def unopened(self, value: Any, reason: str) -> None:
        """Keep nothing."""

    def first(self, tensor: torch.Tensor) -> bool:
        """Never asked, since no cache is opened."""
        return True


class Branch(NamedTuple):
    """The tree spec of a container that is not just a tuple, list or dictionary."""

    kind: str
    cls: str
    keys: tuple[PathKey, ...] | None
    items: tuple[TreeSpec, ...]
    fields: tuple[str, ...] | None = None


class Opaque(NamedTuple):
    """The tree spec of an object that is not looked into: it holds no tensor, or was ``skipped``."""

    cls: str
    skipped: str | None = None


class ArrayOf(NamedTuple):
    """The tree spec of what is no tensor, but is stored as one."""

    cls: str


class _Opening:
    """One object that is looked into, with all that is in it: how many more may be opened.

    ``once`` says that a tensor is taken only where it comes first in the step.
    """

    __slots__ = ("left", "once")

    def __init__(self, once: bool = False) -> None:
        self.left = _MOST_OBJECTS
        self.once = once


def flatten(
    value: Any, leaves: Leaves, seen: tuple[int, ...] = (), opening: _Opening | None = None
) -> TreeSpec:
    """The tree spec of a value, whose leaves are handed over once each.

    What is captured of plain tuples, lists and dictionaries stands here, of all else in `_freeze_other`.
    """
    cls = type(value)
    if cls is _Tensor or issubclass(cls, _Tensor):
        if opening is not None and opening.once and not leaves.first(value):
            return Opaque(class_name(value), SEEN)
        leaves.tensor(value)
        return TENSOR
    if value is None:
        return NONE
    if cls in _SCALARS:
        leaves.scalar(value)
        return SCALAR
    if cls is dict and not value:
        return NO_ITEMS
    if id(value) in seen:
        return Opaque("cycle")
    if len(seen) >= _DEEPEST:
        return _unopened_where(holds_tensor, value, leaves, TOO_DEEP)
    inside = (*seen, id(value))
    if cls is tuple or cls is list:
        items: list[TreeSpec] = []
        for item in value:
            # What arguments mostly are, without a call each.
            if type(item) is _Tensor and opening is None:
                leaves.tensor(item)
                items.append(TENSOR)
            elif item is None:
                items.append(NONE)
            else:
                items.append(flatten(item, leaves, inside, opening))
        return (_LIST if cls is list else _TUPLE, tuple(items))
    if cls is dict and all(type(key) is str for key in value):
        children = tuple([flatten(each, leaves, inside, opening) for each in value.values()])
        return (_DICT, tuple(value), children)
    return _flatten_other(value, leaves, inside, opening)


def _flatten_other(value: Any, leaves: Leaves, inside: tuple[int, ...], opening: _Opening | None) -> TreeSpec:
    """The tree spec of any object; where a class's own code was asked and raised, it counts as skipped."""
    kind = kind_of(type(value))
    what = kind.what
    if what == SCALAR and not extras_of(value, kind):
        leaves.scalar(value)
        return SCALAR
    if what == objects.PLAIN:
        return Opaque(class_name(value))
    if what == objects.NUMBER:
        return _flatten_number(value, leaves)
    if what in objects.UNOPENED or (what == objects.CACHE and what not in leaves.opens):
        return _unopened(value, leaves, what)
    if what == objects.METHOD:
        return _unopened_where(is_of_tensors, value, leaves, what)
    hidden = _hidden(value, kind, leaves)
    if what == objects.HIDDEN:
        return Opaque(class_name(value), hidden)
    if what == objects.CACHE:
        opening = _Opening(once=True)
    elif opening is None:
        opening = _Opening()
    opening.left -= 1
    if opening.left < 0:
        return _unopened_where(holds_tensor, value, leaves, TOO_MANY)
    try:
        parts = _parts_in(value, kind, inside)
    except Exception as error:
        return _unopened(value, leaves, f"looking into it raised {type(error).__name__}")
    if isinstance(parts, str):
        return _unopened(value, leaves, parts)
    if isinstance(parts, torch.Tensor):
        leaves.tensor(parts)
        return ArrayOf(class_name(value))
    if parts is None:
        return Opaque(class_name(value), hidden)
    kind_name, keys, children, fields = parts
    items = tuple([flatten(each, leaves, inside, opening) for each in children])
    if type(value) is dict:
        return (_DICT, keys, items)
    return Branch(kind_name, class_name(value), keys, items, fields)


_Found = tuple[str, tuple[PathKey, ...] | None, Sequence[Any], tuple[str, ...] | None]


def _parts_in(value: Any, kind: Kind, inside: tuple[int, ...]) -> _Found | torch.Tensor | str | None:
    """What is in an object: its parts, an array's tensor, why there is none, or None for nothing."""
    what = kind.what
    if what in (objects.OBJECT, objects.CACHE):
        held = {
            name: each
            for name, each in objects.attributes_of(value, kind).items()
            if id(each) not in inside and holds_tensor(each)
        }
        return (OBJECT, tuple(held), list(held.values()), None) if held else None
    extras = extras_of(value, kind)
    if what == objects.ARRAY:
        return _array_parts(value, extras)
    if what == SCALAR:
        return OBJECT, ("value", *extras), [objects.plain_scalar(value), *extras.values()], None
    if what in (objects.SEQUENCE, objects.SET):
        items = objects.items_of(value)
        if what == objects.SET:
            items = objects.in_order(items)
        if extras:
            return OBJECT, (*range(len(items)), *extras), [*items, *extras.values()], None
        fields = objects.vars_of(type(value), "_fields")
        named = fields if isinstance(fields, tuple) and len(fields) == len(items) else None
        return _TUPLE if issubclass(type(value), tuple) else _LIST, None, items, named
    pairs: list[tuple[PathKey, Any]]
    if what == objects.PYTREE:
        pairs = objects.nodes_of(value)
        return OBJECT, tuple([key for key, _ in pairs]), [each for _, each in pairs], None
    if what == objects.DATACLASS:
        pairs = list(objects.fields_of(value, kind).items())
    else:
        pairs = _labelled(objects.pairs_of(value, kind))
    pairs += extras.items()
    return _DICT, tuple([key for key, _ in pairs]), [each for _, each in pairs], None


def _labelled(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[PathKey, Any]]:
    """A mapping's items by what their keys are called; a key that holds a tensor is an item, too."""
    found: list[tuple[PathKey, Any]] = []
    for place, (key, each) in enumerate(pairs):
        label = objects.key_label(key, place)
        if type(key) is not str and holds_tensor(key):
            found.append((f"{label}.key", key))
        found.append((label, each))
    return found


def _array_parts(value: Any, extras: Mapping[str, Any]) -> _Found | torch.Tensor | str | None:
    """A numpy array as a tensor; one of objects, of records, or with attributes in parts."""
    plain = objects.plain_array(value)
    if extras:
        return OBJECT, ("data", *extras), [plain, *extras.values()], None
    if plain.dtype.names:
        return _DICT, tuple(plain.dtype.names), [plain[name] for name in plain.dtype.names], None
    if plain.dtype.hasobject:
        items = plain.ravel().tolist()
        return (_LIST, None, items, None) if holds_tensor(items) else None
    return objects.tensor_of(plain)


def _flatten_number(value: Any, leaves: Leaves) -> TreeSpec:
    """The tree spec of a numpy scalar: that of the number or string that it is."""
    plain = value.item()
    if type(plain) not in _SCALARS:
        return Opaque(class_name(value))
    leaves.scalar(plain)
    return SCALAR


def _hidden(value: Any, kind: Kind, leaves: Leaves) -> str | None:
    """Why what an object's class hides is not looked into, which is counted; None where that is no tensor."""
    try:
        reason = objects.HIDDEN if hides_tensor(value, kind) else None
    except Exception as error:
        reason = f"looking into it raised {type(error).__name__}"
    if reason is not None:
        leaves.unopened(value, reason)
    return reason


def _unopened_where(
    leads_to_tensors: Callable[[Any], bool], value: Any, leaves: Leaves, reason: str
) -> TreeSpec:
    try:
        leads = leads_to_tensors(value)
    except Exception as error:
        return _unopened(value, leaves, f"looking into it raised {type(error).__name__}")
    return _unopened(value, leaves, reason) if leads else Opaque(class_name(value))


def _unopened(value: Any, leaves: Leaves, reason: str) -> TreeSpec:
    leaves.unopened(value, reason)
    return Opaque(class_name(value), reason)


def count_leaves(treespec: TreeSpec) -> tuple[int, int]:
    """How many tensors and how many scalars a tree spec stands for."""
    if isinstance(treespec, ArrayOf) or treespec in (TENSOR, SCALAR):
        return int(treespec != SCALAR), int(treespec == SCALAR)
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
        skipped = {} if treespec.skipped is None else {"skipped": treespec.skipped}
        return {"type": "object", "class": treespec.cls, **skipped}
    if isinstance(treespec, ArrayOf):
        return {**tensor(path), "class": treespec.cls}
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
