"""Plain hooks on every module of vLLM's model, also from another process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .workload import OnTensor, hooked

_UNDO = "_benchmark_hooks"


@contextmanager
def hooked_all(model: nn.Module, on_tensor: OnTensor) -> Iterator[None]:
    """Hooks also on those modules whose own ``__call__`` would pass them by."""
    classes = {module: type(module) for module in model.modules()}
    for module, cls in classes.items():
        if cls.__call__ is not nn.Module.__call__:
            module.__class__ = type(cls.__name__, (cls,), {"__call__": nn.Module.__call__})
    try:
        with hooked(model, on_tensor):
            yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


def noop_hooks(model: nn.Module) -> None:
    """In the worker: hooks on every module that do nothing."""
    stack = ExitStack()
    stack.enter_context(hooked_all(model, lambda name, direction, index, tensor: None))
    model.__dict__[_UNDO] = stack


def no_hooks(model: nn.Module) -> None:
    """In the worker: those hooks removed."""
    model.__dict__.pop(_UNDO).close()
