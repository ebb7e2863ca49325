"""Standing in for a module's ``forward`` only to know which of its calls in a step runs."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import nn

from ...hotpath.intercept import FORWARD, StandIn, put_back
from ...hotpath.listening import Hearing

_is_compiling = torch.compiler.is_compiling
_get_ident = threading.get_ident
# Which backward this thread is in; -1 for none.
in_backward = torch._C._current_graph_task_id


class Counts(Protocol):
    """Who knows a module's calls in the step that runs."""

    @property
    def count(self) -> int:
        """How many began."""
        ...

    @property
    def running(self) -> int:
        """The one that runs, the innermost; negative while none does."""
        ...

    def wants(self, call: int) -> bool:
        """Whether a call is captured itself, whatever its taps are."""
        ...


class CallCounter(StandIn):
    """Counts the calls of a module that nobody listens to."""

    __slots__ = ("_hearing", "count", "name", "running")

    def __init__(self, name: str, module: nn.Module, hearing: Hearing) -> None:
        super().__init__(module, FORWARD, put_back(vars(module).get(FORWARD)))
        self.name = name
        self.count = 0
        self.running = -1
        self._hearing = hearing

    def wants(self, call: int) -> bool:
        """None of them is captured."""
        return False

    def again(self) -> CallCounter:
        """Who counts from now on: another one where others changed what this one stands for."""
        each = self
        if self.dead or self.own.get(FORWARD) is not self.replaced:
            self.dead = True
            each = CallCounter(self.name, self.module, self._hearing)
        each.count, each.running = 0, -1
        each.put()
        return each

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``."""
        if _is_compiling() or self.dead or _get_ident() != self._hearing.owner or in_backward() >= 0:
            return self.now()(*args, **kwargs)
        before, self.running = self.running, self.count
        self.count += 1
        try:
            return self.now()(*args, **kwargs)
        finally:
            self.running = before
