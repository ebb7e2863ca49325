"""Listening to modules whose results give way to those of another run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .counting import in_backward
from .operator_listener import OperatorListener
from .operators import Operators

_get_ident = threading.get_ident
_is_compiling = torch.compiler.is_compiling


class Injector(Protocol):
    """Who has results of another run."""

    def enters(self, directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model itself is called, with these arguments."""
        ...

    def result_for(self, directory: str, own: Any, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """What stands for the result of a selected call with these arguments; itself, where nothing may."""
        ...


class InjectListener(OperatorListener):
    """A listener that hands on another run's result in the place of its module's own.

    ``injects`` says of which calls. The model itself, which is the one with an empty name, is only watched.
    Operators within are heard as usual: the module's own code runs.
    """

    __slots__ = ("injector", "injects")

    def __init__(
        self,
        injector: Injector,
        injects: Callable[[int], bool],
        operators: Operators | None,
        chosen: bool,
        *given: Any,
    ) -> None:
        self.injector = injector
        self.injects = injects
        super().__init__(operators, chosen, *given)

    def _like_this(self, *given: Any) -> InjectListener:
        return InjectListener(self.injector, self.injects, self.operators, self.chosen, *given)

    def _given(self) -> Callable[..., Any]:
        return self._injected

    def _injected(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or _get_ident() != self._hearing.owner or in_backward() >= 0:
            return self.original(*args, **kwargs)
        call = max(0, self.running)
        if not self.name:
            self.injector.enters(self._directory(self.name, call), args, kwargs)
        output = self._watched(*args, **kwargs)
        if not self.injects(call):
            return output
        directory = self._directory(self.name, call)
        found = self.injector.result_for(directory, output, (args, kwargs))
        if self.operators is not None and found is not output:
            self.operators.operands.note(found, f"{directory}/outputs", again=False)
        return found
