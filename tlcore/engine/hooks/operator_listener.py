"""Listening to modules within whose calls operators are heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .listening import Listener
from .operators import Operators

_is_compiling = torch.compiler.is_compiling


class OperatorListener(Listener):
    """A listener around whose calls operators are heard, or not even then where PyTorch asks for it.

    Without ``operators`` it is like any other.
    """

    __slots__ = ("chosen", "operators")

    def __init__(self, operators: Operators | None, chosen: bool, *given: Any) -> None:
        self.operators = operators
        self.chosen = chosen
        super().__init__(*given)

    def _like_this(self, *given: Any) -> OperatorListener:
        return OperatorListener(self.operators, self.chosen, *given)

    def _given(self) -> Callable[..., Any]:
        return self._watched

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.original(*args, **kwargs)
        operators, original = self.operators, self.now()
        if operators is None or not operators.listens():
            return original(*args, **kwargs)
        if not (self.chosen or operators.depth):
            return original(*args, **kwargs)
        if _asks(self.module):
            if self.chosen:
                operators.left_out[self.name] = None
            return operators.aside(original, args, kwargs)
        directory = self._directory(self.name, max(0, self.running))
        note = operators.operands.note
        note(args, f"{directory}/inputs", again=False)
        note(kwargs, f"{directory}/inputs", again=False)
        call = operators.within if self.chosen else _plainly
        before = operators.runs(self.module)
        try:
            output = call(original, args, kwargs)
        finally:
            operators.running = before
        note(output, f"{directory}/outputs", again=False)
        return output


def _plainly(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs)


_ASKING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def may_ask(module: nn.Module) -> bool:
    """Whether a module's code may ask if functions of torch are watched, and then compute otherwise."""
    return isinstance(module, _ASKING)


def _asks(module: nn.Module) -> bool:
    return may_ask(module) and not module.training and torch.backends.mha.get_fastpath_enabled()
