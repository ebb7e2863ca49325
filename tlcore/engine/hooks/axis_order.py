"""Whether a model may have the positions of a batch in front of its samples, as far as its modules tell."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

from torch import nn

# What exchanges the first two axes of a tensor, with these two numbers first.
_SWAPS = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), ((0, 1), (1, 0))),
    "permute": ((1, 0),),
}
_EINOPS = "rearrange"
# A call's method, its tensor and two numbers are no farther from each other.
_NEAR = 8
_LOADS = ("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL")
_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")


def packs(modules: Iterable[nn.Module]) -> bool:
    """Whether modules are given packed sequences, or are not ``batch_first``."""
    return any(isinstance(m, nn.RNNBase) or getattr(m, "batch_first", True) is False for m in modules)


def swaps_in_code(classes: Iterable[type]) -> bool:
    """Whether the code of modules of these classes exchanges the first two axes of some tensor.

    That is true of models whose own layers have positions first (XLNet, Longformer), and of few others.
    """
    return any(_swaps(code) for cls in classes for code in _codes(cls))


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of a class's ``forward``, and of the methods that it names."""
    if cls.__module__.startswith("torch.nn."):
        return
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for found in (vars(base)[name] for base in cls.__mro__ if name in vars(base)):
            function = inspect.unwrap(getattr(found, "__func__", found))
            if isinstance(function, FunctionType):
                yield function.__code__
                named = {each for each in function.__code__.co_names if each not in seen}
                seen |= named
                waiting += named


def _swaps(code: CodeType) -> bool:
    if any(isinstance(each, CodeType) and _swaps(each) for each in code.co_consts):
        return True
    if _EINOPS in code.co_names:
        return True
    if not _SWAPS.keys() & set(code.co_names):
        return False
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        wanted = _SWAPS.get(step.argval) if isinstance(step.argval, str) else None
        if wanted and step.opname in _LOADS:
            near = [each.argval for each in steps[place + 1 : place + _NEAR] if each.opname in _CONSTANTS]
            numbers = tuple(each for each in near if type(each) is int)
            if numbers[:2] in wanted or any(type(each) is tuple and each[:2] in wanted for each in near):
                return True
    return False
