"""Listening to modules within whose calls operators are heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...hotpath.intercept import FORWARD
from .listening import Listener
from .operators import Operators


class OperatorListener(Listener):
    """A listener around whose calls operators are heard, or not even then where PyTorch asks for it.

    Without ``operators`` it is like any other.
    """

    __slots__ = ("asks", "chosen", "operators")

    def __init__(self, operators: Operators | None, chosen: bool, *given: Any) -> None:
        self.operators = operators
        self.chosen = chosen
        super().__init__(*given)
        self.asks = may_ask(self.module)

    def _like_this(self, *given: Any) -> OperatorListener:
        return OperatorListener(self.operators, self.chosen, *given)

    def _given(self) -> Callable[..., Any]:
        return self._watched

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        operators, original = self.operators, self.original
        if self.replaced is None and getattr(type(self.module), FORWARD, None) is not self._by_class:
            original = self.now()
        if operators is None or not operators.listens() or not (self.chosen or operators.depth):
            return original(*args, **kwargs)
        if self.asks and _asks(self.module):
            if self.chosen:
                operators.left_out[self.name] = None
            return operators.aside(original, args, kwargs)
        if not operators.depth:
            operators.operands.unheard()
        if not (operators.knows(args) and operators.knows(kwargs)):
            self._note((args, kwargs), "inputs", operators)
        before = operators.runs(self.module, self.listening.running)
        try:
            if self.chosen and not operators.depth:
                output = operators.within(original, args, kwargs)
            else:
                output = original(*args, **kwargs)
        finally:
            operators.running = before
        if not operators.knows(output):
            self._note((output,), "outputs", operators)
        return output

    def _note(self, values: tuple[Any, ...], side: str, operators: Operators) -> None:
        """Tensors that are not known are from now on what this side of the call has."""
        place = f"{self._directory(self.name, max(0, self.running))}/{side}"
        for value in values:
            operators.operands.note(value, place, again=False)


_ASKING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def may_ask(module: nn.Module) -> bool:
    """Whether a module's code may ask if functions of torch are watched, and then compute otherwise."""
    return isinstance(module, _ASKING)


def _asks(module: nn.Module) -> bool:
    return not module.training and torch.backends.mha.get_fastpath_enabled()
