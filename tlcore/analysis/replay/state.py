"""A module's own state: a call must neither see what one before it left, nor leave anything itself."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What `nn.Module` itself keeps: hooks and submodules stay as they are, buffers are looked at apart.
_OWN = frozenset(nn.Module().__dict__)


@contextmanager
def state_kept(module: nn.Module | Callable[..., Any]) -> Iterator[None]:
    """Within, buffers and other tensors, numbers and containers of a module are its call's to change."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [(each, dict(each.__dict__), dict(each._buffers)) for each in modules]
    try:
        for each, attributes, buffers in before:
            each._buffers.update((key, None if it is None else it.clone()) for key, it in buffers.items())
            each.__dict__.update(
                (key, _copied(value)) for key, value in attributes.items() if key not in _OWN
            )
        yield
    finally:
        for each, attributes, buffers in before:
            each.__dict__.clear()
            each.__dict__.update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)


def _copied(value: Any) -> Any:
    """A copy of what may be changed in place; anything else is the same."""
    if isinstance(value, torch.Tensor):
        return value.clone() if type(value) is torch.Tensor else value
    if type(value) in (list, dict, set, deque) and not _holds_modules(value):
        try:
            return copy.deepcopy(value)
        except Exception:
            return copy.copy(value)
    return value


def _holds_modules(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return any(isinstance(each, (nn.Module, nn.Parameter)) for each in parts)
