"""The tensors that objects lead to, however deep, without looking into what is not opened."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any

import torch

from .objects import (
    ARRAY,
    CACHE,
    DATACLASS,
    HIDDEN,
    MAPPING,
    METHOD,
    MOST_VALUES,
    NUMBER,
    PLAIN,
    PYTREE,
    SCALAR,
    SEQUENCE,
    SET,
    SIMPLE,
    TENSOR,
    UNOPENED,
    Kind,
    attributes_of,
    fields_of,
    hidden_in,
    items_of,
    kind_of,
    nodes_of,
    pairs_of,
)


def extras_of(value: Any, kind: Kind) -> dict[str, Any]:
    """What a container's own attributes hold beside its items, where that holds a tensor."""
    if kind.own is None and not kind.slots:
        return {}
    if kind.what == MAPPING and not issubclass(type(value), (dict, collections.UserDict)):
        return {}
    held = kind.attributes(value)
    if issubclass(type(value), collections.UserDict):
        held.pop("data", None)
    if kind.what == DATACLASS:
        held = {name: each for name, each in held.items() if name not in kind.fields}
    if not held:
        return {}
    items = {id(each) for each in _children(value, kind, extras=False)}
    return {name: each for name, each in held.items() if id(each) not in items and holds_tensor(each)}


def holds_tensor(value: Any) -> bool:
    """Whether a value is or leads to a tensor, or to something that may hold one and is not looked into."""
    waiting, kept = [value], []
    seen: set[int] = set()
    left = MOST_VALUES
    while waiting:
        each = waiting.pop()
        kind = kind_of(type(each))
        if kind.what in (PLAIN, NUMBER, METHOD) or id(each) in seen:
            continue
        if kind.what in (TENSOR, ARRAY, CACHE, *UNOPENED):
            return True
        seen.add(id(each))
        # Kept, since a number is only an object's own as long as that lives.
        kept.append(each)
        left -= 1
        if left < 0:
            return True
        waiting += [child for child in _children(each, kind) if type(child) not in SIMPLE]
    return False


def hides_tensor(value: Any, kind: Kind) -> bool:
    """Whether an object holds a tensor where its class shows none."""
    return (kind.what == HIDDEN or kind.hides) and any(map(holds_tensor, hidden_in(value, kind)))


def tensors_in(value: Any, most: int, looks: float = math.inf) -> Iterator[torch.Tensor]:
    """The distinct tensors that an object holds, as far as it can be looked into; ``most`` of them.

    At most so many objects are looked at.
    """
    waiting: list[Any] = [value]
    kept: list[Any] = []
    seen: set[int] = set()
    while waiting and most > 0 and len(kept) < looks:
        each = waiting.pop()
        kind = kind_of(type(each))
        if id(each) in seen or kind.what in (PLAIN, NUMBER, ARRAY, METHOD, *UNOPENED):
            continue
        seen.add(id(each))
        kept.append(each)
        if kind.what == TENSOR:
            most -= 1
            yield each
        else:
            waiting += [child for child in _children(each, kind) if type(child) not in SIMPLE]


def is_of_tensors(method: Any) -> bool:
    """Whether the object whose `METHOD` it is holds a tensor; modules' own methods are everywhere.

    May raise what the object's own code raises.
    """
    return any(True for _ in tensors_in(getattr(method, "__self__", None), 1, MOST_VALUES))


def _children(value: Any, kind: Kind, extras: bool = True) -> list[Any]:
    own = list(kind.attributes(value).values()) if extras and (kind.own or kind.slots) else []
    if kind.what in (SEQUENCE, SET):
        return items_of(value) + own
    if kind.what == MAPPING:
        pairs = pairs_of(value, kind)
        return [key for key, _ in pairs if type(key) is not str] + [each for _, each in pairs] + own
    if kind.what == DATACLASS:
        return [*fields_of(value, kind).values(), *own]
    if kind.what in (ARRAY, SCALAR):
        return own
    if kind.what == HIDDEN:
        return hidden_in(value, kind)
    if kind.what == PYTREE:
        return [child for _, child in nodes_of(value)]
    return list(attributes_of(value, kind).values()) + (hidden_in(value, kind) if kind.hides else [])
