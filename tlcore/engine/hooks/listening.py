"""Listening to the selected modules' calls, only while a selected step runs.

A module is listened to by standing in for its ``forward``, which also hears calls that never come by
``Module.__call__``. What forward hooks of others make of its result is heard behind the last of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...hotpath.intercept import (
    FORWARD,
    StandIn,
    hooks_follow,
    is_stand_in,
    lies_in,
    put_back,
    raised_through,
    without_dead,
)
from ...hotpath.listening import PYTHON_HALF, Hearing, listening_of
from ..calls import Call
from ..staging.dtensors import has_dtensors
from .collector import Collector
from .counting import CallCounter
from .module_tree import ModuleTree, Named
from .tracing import compiles, key_of, why_traced

NOBODY = 0
_compiler = torch.compiler
# Where nothing is compiled, this and a flag are asked for less than `is_compiling`.
_is_traced = torch.compiler.is_dynamo_compiling
_get_ident = threading.get_ident
Self = TypeVar("Self", bound="Listener")


class Listener(StandIn):
    """One module's listener: counts its calls in the step and hands the wanted ones to the collector.

    ``found`` is what the module's own ``__dict__`` has as its ``forward``.
    """

    __slots__ = (
        "_collector",
        "_directory",
        "_hear",
        "_hearing",
        "_post",
        "_sites",
        "_wanted",
        "handles",
        "known_as",
        "listening",
        "name",
    )

    def __init__(
        self,
        name: str,
        module: nn.Module,
        wanted: frozenset[int] | Literal["all"],
        collector: Collector,
        hearing: Hearing,
        directory: Callable[[str, int], str],
        post_inputs: bool,
    ) -> None:
        super().__init__(module, FORWARD, put_back(vars(module).get(FORWARD)))
        self.name = name
        self._directory = directory
        self._sites: list[Call | None] = []
        self._wanted = wanted
        self._collector = collector
        self._hearing = hearing
        self._post = post_inputs
        self.handles: list[RemovableHandle] = []
        self.known_as = key_of(self)
        given = (collector, hearing, self.own, self._sites, self.handles, post_inputs)
        # The extension knows nothing of gradients.
        walker = collector.walker if collector.gradients is None else None
        self.listening = listening_of(walker, *given)
        self._aim_it()
        self._hear = self.listening.hear

    def _aim_it(self) -> None:
        self.listening.aim(self._given(), self.replaced)

    def _given(self) -> Callable[..., Any]:
        """What a call goes on to."""
        return self.original

    def successor(self: Self) -> Self:
        """A new listener for the module, around whatever stands for its ``forward`` now.

        This one may be held inside that, and passes by for ever.
        """
        self.dead = True
        self._wanted, wanted = frozenset(), self._wanted
        given = (wanted, self._collector, self._hearing, self._directory, self._post)
        next_one = self._like_this(self.name, self.module, *given)
        next_one.goes_on_from(self)
        return next_one

    def _like_this(self: Self, *given: Any) -> Self:
        """Another of the same kind, with all that is the kind's own."""
        return type(self)(*given)

    def goes_on_from(self, other: Listener) -> None:
        """Count on where another listener ends, which hears nothing any more."""
        self._sites[:] = other._sites
        for key in ("count", "elsewhere", "running"):
            setattr(self.listening, key, getattr(other.listening, key))
        other.retire()

    def retire(self) -> None:
        """Hear nothing any more, whoever holds this."""
        self.dead = True
        self._hearing = _DEAF
        self.listening.deafen(_DEAF)

    def follow(self, found: Any) -> bool:
        """Whether to stand in for ``found`` is the same as before but for other captures' listeners."""
        base, mine = found, self.replaced
        while is_stand_in(base):
            if base is self:
                return False
            base = base.replaced
        while is_stand_in(mine):
            mine = mine.replaced
        if self.dead or base is not mine:
            return False
        self.replaced = without_dead(found)
        self._by_class = self._given_by_class()
        self.original = self.module.forward if self.replaced is None else self.replaced
        self._aim_it()
        return True

    @property
    def heard(self) -> bool:
        """Whether any call was captured."""
        return any(self._sites)

    @property
    def called(self) -> bool:
        """Whether there was any call, wanted or not."""
        return bool(self._sites or self.listening.elsewhere)

    def wants(self, call: int) -> bool:
        """Whether a call is captured itself, whatever its taps are."""
        return self._wanted == "all" or call in self._wanted

    @property
    def count(self) -> int:
        """How many calls began in the step."""
        return self.listening.count

    @property
    def running(self) -> int:
        """Which of them runs, the innermost one; negative while none does."""
        return self.listening.running

    def _new_call(self) -> Call | None:
        """The sides of a call later in the step than any before; None when it is not wanted."""
        call = len(self._sites)
        if self._wanted == "all" or call in self._wanted:
            self._sites.append(Call(self.name, call, self._directory(self.name, call)))
        else:
            self._sites.append(None)
        return self._sites[call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``."""
        if _is_traced() or _compiler._is_compiling_flag:
            compiles(self.known_as)
            return self.original(*args, **kwargs)
        return self._hear(self, args, kwargs)

    def is_traced(self, reason: str) -> None:
        """A call of it is only traced."""
        if not self.dead:
            self._collector.passed_by.note(self.name, reason)

    def _is_traced_now(self) -> bool:
        reason = why_traced()
        if reason is not None:
            self.is_traced(reason)
        return reason is not None

    def _aim_anew(self) -> None:
        self.now()
        self._aim_it()

    def _is_covered(self) -> bool:
        """Whether a call comes from what others have put around this, and not only another listener."""
        return not lies_in(self.own.get(FORWARD), self)

    def _raised(
        self, sides: Call, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._collector.raised(sides, error)
        if self._post:
            self._collector.post_fwd_inputs(sides, args, kwargs)

    def _hear_behind_hooks(self, sides: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether hooks come now, which may change the result; if so it is captured behind the last one.

        Our hook is there only from the moment when ``forward`` has returned, so that no code of the model
        sees it, and whatever was registered until then comes before it.
        """
        module = self.module
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if not hooks_follow(sys._getframe(1), module, OURS):
            return False
        heard = False

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal heard
            if heard:
                return
            heard = True
            error = raised_through(sys._getframe(1))
            if error is None:
                # Not while PyTorch walks through the very dictionary, as it does after an error.
                self.handles.remove(handle)
                handle.remove()
            if not self._hearing.owner:
                return
            if error is not None:
                self._raised(sides, error, args, kwargs)
                return
            self._collector.outputs(sides, output)
            self._collector.parts_of(None)
            if self._post:
                self._collector.post_fwd_inputs(sides, args, kwargs)

        if has_dtensors(module):
            self._note_parts(module)
        handle = module.register_forward_hook(after, always_call=True)
        self.handles.append(handle)
        return True

    def _note_parts(self, module: nn.Module) -> None:
        """Before all other hooks see the result: those of tensor parallelism hand on a part of it."""

        def before(module: nn.Module, inputs: Any, output: Any) -> None:
            self.handles.remove(handle)
            handle.remove()
            self._collector.parts_of(output)

        handle = module.register_forward_hook(before, prepend=True)
        self.handles.append(handle)

    def take_away(self) -> bool:
        """Leave the module as it was. False, and dead, where somebody else's lies in our place meanwhile."""
        while self.handles:
            self.handles.pop().remove()
        if super().take_away():
            return True
        self.listening.dead = True
        return False


_DEAF = Hearing()
# Code that lies between a module's call and what it calls.
OURS = {Listener.__call__.__code__, CallCounter.__call__.__code__, PYTHON_HALF}


class Source(Protocol):
    """Captures some modules in another way than by listening to their ``forward``."""

    @property
    def modules(self) -> Container[nn.Module]:
        """Those that it captures; nobody else listens to them."""
        ...

    def begin_step(self, collector: Collector) -> None:
        """Fill the collector from now on."""
        ...

    def end_step(self) -> str | None:
        """Add what is still missing, and say what went wrong, if anything."""
        ...


# Makes the listener of a module, None where it is not to be heard; given the names of all modules, too.
Select = Callable[[Named, frozenset[str], Hearing], "Listener | None"]
# A model's submodules by the names that they are to go by, those left out that go by none.
ModulesOf = Callable[[nn.Module], Mapping[str, nn.Module]]
# The modules that are heard, by the names that they go by.
Rename = Callable[[ModuleTree], "list[Named]"]
