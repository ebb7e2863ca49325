"""One call of a module that is listened to: what it is given and returns is taken, then it goes on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module

from .native import extension

_FORWARD = "forward"
_get_ident = threading.get_ident
# Which backward this thread is in; -1 for none.
_backward = torch._C._current_graph_task_id
_global_hooks = torch_module._global_forward_hooks
# What may mean that a call is only traced; the listener knows whether it does.
_is_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack
_fx = vars(_symbolic_trace)
_FX_FLAG = "_is_fx_tracing_flag"
# Of releases that have no such flag: there, as in 2.14, it is a thread's own.
_says_fx = None if _FX_FLAG in _fx else _fx.get("_get_is_fx_tracing") or _fx.get("is_fx_symbolic_tracing")
# Whether `torch.fx` traces a module. Asked in each step and call: no function of ours is between.
is_symbolic: Callable[[], Any] = functools.partial(_fx.get, _FX_FLAG) if _says_fx is None else _says_fx


class _Hearing:
    """Whose calls all listeners of a model hear at the moment: those of the thread ``owner``, 0 for none."""

    __slots__ = ("owner",)

    def __init__(self) -> None:
        self.owner = 0


class _KnownSides:
    """The sides of one call, ``inputs`` and ``outputs``, each by the structures that it has had."""

    __slots__ = ("inputs", "outputs")

    inputs: dict[Any, Any]
    outputs: dict[Any, Any]


class _Listening:
    """What a listener does for each call: counts it, and hands the wanted ones to the collector.

    ``sites`` are the sides of each call in a step, None for one that is not wanted; the listener's
    ``_new_call`` makes more. ``own`` is the module's ``__dict__``, ``handles`` are hooks to be removed.
    One that is ``dead`` never stands in again. ``elsewhere`` counts calls in threads other than the step's,
    which nobody can put in order. ``covered`` says that others have put something around it within a step.
    ``running`` is the call that runs, the innermost one; negative while none does.
    """

    __slots__ = (
        "collector",
        "count",
        "covered",
        "dead",
        "elsewhere",
        "given",
        "handles",
        "hearing",
        "module",
        "original",
        "own",
        "post",
        "replaced",
        "running",
        "sites",
    )

    def __init__(
        self,
        collector: Any,
        hearing: Any,
        own: dict[str, Any],
        sites: list[Any],
        handles: list[Any],
        post: bool,
    ) -> None:
        self.collector = collector
        self.hearing = hearing
        self.own = own
        self.sites = sites
        self.handles = handles
        self.post = post
        self.count = self.elsewhere = 0
        self.running = -1
        self.dead = self.covered = False
        self.original: Callable[..., Any] | None = None
        self.replaced = self.module = self.given = None  # type: Any

    def aim(self, original: Callable[..., Any], replaced: Any) -> None:
        """What it stands for, and what the module's own ``__dict__`` had under its name, None for nothing."""
        self.original, self.replaced = original, replaced
        module, given = getattr(original, "__self__", None), getattr(original, "__func__", None)
        usual = replaced is None and getattr(type(module), _FORWARD, None) is given
        # The function that the module's class gave, and which others may exchange for all modules at once.
        self.module, self.given = (module, given) if usual else (None, None)

    def deafen(self, hearing: Any) -> None:
        """Hear nobody but this `Hearing`, and stand in no more."""
        self.hearing = hearing
        self.dead = True

    def hear(self, listener: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of what it stands for."""
        if self.given is not None and getattr(type(self.module), _FORWARD, None) is not self.given:
            listener._aim_anew()
        original, hearing, collector = self.original, self.hearing, self.collector
        assert original is not None
        if _get_ident() != hearing.owner:
            # Seldom, so that it costs nothing to look whether a step is in progress.
            self.elsewhere += bool(hearing.owner and _backward() < 0)
            return original(*args, **kwargs)
        if _backward() >= 0:
            # What backward calls, it computes once more, as activation checkpointing does.
            return original(*args, **kwargs)
        if (_is_tracing() or _modes() or is_symbolic()) and listener._is_traced_now():
            return original(*args, **kwargs)
        call = self.count
        self.count = call + 1
        sides = self.sites[call] if call < len(self.sites) else listener._new_call()
        before, self.running = self.running, call
        if sides is None:
            try:
                return original(*args, **kwargs)
            finally:
                self.running = before
        if self.own.get(_FORWARD) is not listener and listener._is_covered():
            self.covered = True
        collector.inputs(sides, args, kwargs)
        try:
            output = original(*args, **kwargs)
        except BaseException as error:
            self.running = before
            if hearing.owner:
                listener._raised(sides, error, args, kwargs)
            raise
        self.running = before
        # The step may have ended inside the call.
        if hearing.owner and not (
            (_global_hooks or self.own.get("_forward_hooks"))
            and listener._hear_behind_hooks(sides, args, kwargs)
        ):
            collector.outputs(sides, output)
            if self.post:
                collector.post_fwd_inputs(sides, args, kwargs)
        return output


def _put_all(listeners: Sequence[Any], all_of_them: Sequence[Any], begin: int) -> int:
    for index in range(begin, len(all_of_them)):
        each = all_of_them[index]
        if each.dead or each.own.get(_FORWARD) is not each.replaced:
            return index
        each.count = each.elsewhere = 0
        each.own[_FORWARD] = listeners[index]
    return len(all_of_them)


def _take_all(listeners: Sequence[Any], all_of_them: Sequence[Any], begin: int) -> int:
    for index in range(begin, len(all_of_them)):
        each = all_of_them[index]
        usual = each.replaced is None and not each.covered and not each.handles
        if not usual or each.own.get(_FORWARD) is not listeners[index]:
            return index
        del each.own[_FORWARD]
    return len(all_of_them)


Listening = _Listening
# The code of the Python half, which stands among the frames of a call.
PYTHON_HALF = _Listening.hear.__code__

if TYPE_CHECKING:
    Hearing = _Hearing
    KnownSides = _KnownSides
else:
    Hearing = extension.Hearing if extension else _Hearing
    KnownSides = extension.KnownSides if extension else _KnownSides
    if extension:
        fx = (_fx, _FX_FLAG) if _says_fx is None else (_says_fx, None)
        extension.use_torch(_global_hooks, _backward, _is_tracing, _modes, *fx)


def listening_of(walker: Any, *given: Any) -> _Listening:
    """A `Listening`; of the extension where there is a walker of it to work with."""
    made: _Listening = _Listening(*given) if walker is None else extension.Listening(walker, *given)
    return made


def put_all(listeners: list[Any], all_of_them: list[_Listening], begin: int) -> int:
    """Put each listener from ``begin`` on in its place; returns where something unusual stands, or the end.

    Listeners and what they do for each call are in the same order, and all of one half.
    """
    in_python = not all_of_them or type(all_of_them[0]) is _Listening
    return int((_put_all if in_python else extension.put_all)(listeners, all_of_them, begin))


def take_all(listeners: list[Any], all_of_them: list[_Listening], begin: int) -> int:
    """Take each listener from ``begin`` on away; returns where that is more than a deletion, or the end."""
    in_python = not all_of_them or type(all_of_them[0]) is _Listening
    return int((_take_all if in_python else extension.take_all)(listeners, all_of_them, begin))
