"""Keeping a listener around whatever stands for a module's ``forward`` while a step runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...hotpath.intercept import FORWARD, WHOLE_CALL, StandIn, is_stand_in, without_dead

_is_compiling = torch.compiler.is_compiling


class Keeper(StandIn):
    """Stands in for a module's whole call, and calls ``refit`` where its ``forward`` is not ``listener`` now.

    So a ``forward`` that others put there within a step, or another class of the module, is heard from its
    first call on.
    """

    __slots__ = ("_class", "_refit", "listener")

    def __init__(self, module: nn.Module, refit: Callable[[nn.Module, bool], None]) -> None:
        super().__init__(module, WHOLE_CALL, None)
        self.listener: Any = None
        self._class: type = type(module)
        self._refit = refit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, all hooks of others inside."""
        if _is_compiling():
            return self.original(*args, **kwargs)
        changed = type(self.module) is not self._class
        if (changed or self.own.get(FORWARD) is not self.listener) and not self.dead:
            self._class = type(self.module)
            self._refit(self.module, changed)
        return self.now()(*args, **kwargs)

    def keep(self, listener: Any) -> None:
        """Begin to look after a listener."""
        self.listener = listener
        self._class = type(self.module)
        found = without_dead(self.own.get(WHOLE_CALL))
        if found is not None and not is_stand_in(found):
            # Compiled, so that nobody comes by here.
            return
        if found is not self.replaced:
            self.replaced = found
            self._by_class = self._given_by_class()
            self.original = self.module._call_impl if found is None else found
        self.put()

    def leave(self) -> Keeper:
        """Leave the module as it was; who is to look after it next time."""
        own: dict[str, object] = self.own
        if self.replaced is None and own.get(WHOLE_CALL) is self:
            # As nearly all are, and there may be a thousand.
            del own[WHOLE_CALL]
        elif not self.take_away():
            return Keeper(self.module, self._refit)
        return self
