"""A module's own state: a call must neither see what one before it left, nor leave anything itself."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What `nn.Module` itself keeps: hooks and submodules stay as they are, buffers are looked at apart.
_OWN = frozenset(nn.Module().__dict__)


# So deep a value is looked into for tensors: a cache has layers, which have keys and values.
_DEEPEST = 4
_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
Changed = Callable[[], list[str]]
Memo = dict[int, Any]


@contextmanager
def state_kept(module: nn.Module | Callable[..., Any]) -> Iterator[Changed]:
    """Within, buffers and other tensors, numbers and containers of a module are its call's to change.

    What comes of it tells the names of those that have changed until then.
    """
    modules = list(module.named_modules()) if isinstance(module, nn.Module) else []
    before = [(name, each, dict(each.__dict__), dict(each._buffers)) for name, each in modules]

    def changed() -> list[str]:
        found = []
        for name, each, attributes, buffers in before:
            now = {**{key: it for key, it in each.__dict__.items() if key not in _OWN}, **each._buffers}
            then = {**attributes, **buffers}
            keys = [key for key, it in now.items() if key not in then or not _same(then[key], it)]
            found += [f"{name}.{key}" if name else key for key in keys]
        return found

    # What two modules share stays one thing.
    memo: Memo = {}
    try:
        for _, each, attributes, buffers in before:
            each._buffers.update((key, copied(it, memo)) for key, it in buffers.items())
            own = ((key, value) for key, value in attributes.items() if key not in _OWN)
            each.__dict__.update((key, copied(value, memo)) for key, value in own)
        yield changed
    finally:
        for _, each, attributes, buffers in before:
            each.__dict__.clear()
            each.__dict__.update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)


def copied(value: Any, memo: Memo) -> Any:
    """A copy of what may be changed in place, also of an object of plain parts; else the value itself.

    ``memo`` is that of `copy.deepcopy`.
    """
    if isinstance(value, torch.Tensor):
        return memo.setdefault(id(value), value.clone()) if type(value) is torch.Tensor else value
    plain = type(value) in (list, dict, set, deque)
    if (plain and not _holds_modules(value)) or (hasattr(value, "__dict__") and _is_plain(value)):
        try:
            return copy.deepcopy(value, memo)
        except Exception:
            return copy.copy(value) if plain else value
    return value


def _inside(value: Any) -> Iterable[Any]:
    """What lies directly in a container or an object."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, deque)):
        return value
    return getattr(value, "__dict__", {}).values()


def _is_plain(value: Any, deep: int = _DEEPEST) -> bool:
    """Whether a value is of tensors, numbers, texts and containers alone: so is a cache, and no model is."""
    if type(value) is torch.Tensor or isinstance(value, _ATOMS):
        return True
    if deep == 0 or isinstance(value, (nn.Module, torch.Tensor)) or callable(value):
        return False
    has_parts = isinstance(value, (Mapping, list, tuple, set, deque)) or hasattr(value, "__dict__")
    return has_parts and all(_is_plain(each, deep - 1) for each in list(_inside(value)))


def _holds_modules(value: Any) -> bool:
    return any(isinstance(each, (nn.Module, nn.Parameter)) for each in _inside(value))


def _same(one: Any, other: Any, deep: int = _DEEPEST) -> bool:
    """Whether a value is what it was, as far as its tensors, numbers and texts tell."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same_values(one, other)
    if isinstance(one, (int, float, complex, str, bytes)):
        return bool(one == other or (one != one and other != other))
    if deep == 0:
        return True
    if isinstance(one, set):
        return len(one) == len(other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key], deep - 1) for key in one)
    mine, its = list(_inside(one)), list(_inside(other))
    return len(mine) == len(its) and all(_same(a, b, deep - 1) for a, b in zip(mine, its, strict=True))


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(torch.all((one == other) | ((one != one) & (other != other))))
