"""Listening to the selected modules' calls, only while a selected step runs.

A module is listened to by standing in for its ``forward``: that costs a third of what a pair of PyTorch's
hooks costs, and also hears calls that never come by ``Module.__call__``. Where somebody else's hooks are on
the module, which may change arguments and results, PyTorch's own hooks are used, behind theirs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Mapping
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ...errors import CaptureError
from ..calls import Call
from .collector import Collector

_NOBODY = 0
_CALL_CODE = nn.Module._call_impl.__code__
_is_compiling = torch.compiler.is_compiling
_get_ident = threading.get_ident


class Listener:
    """One module's listener: counts its calls in the step and hands the wanted ones to the collector.

    It is put in the place of the module's ``forward``, or its `before` and `after` are registered as hooks.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        wanted: frozenset[int] | Literal["all"],
        collector: Collector,
        directory: Callable[[str, int], str],
        post_inputs: bool,
    ) -> None:
        self.module = module
        self.owner = _NOBODY
        self.name = name
        self._directory = directory
        self._sites: list[Call | None] = []
        self._count = 0
        # Calls in threads other than the step's, which nobody can put in order.
        self.elsewhere = 0
        self._wanted = wanted
        self._collector = collector
        self._post = post_inputs
        self._open: list[Call | None] = []
        self._forward: Callable[..., Any] = module.forward
        self._replaced: Any = None
        self._installed = False
        self.wrapped_by_others = False
        self._handles: list[RemovableHandle] = []

    def successor(self) -> Listener:
        """A new listener for the module, around whatever has been wrapped around this one.

        This one stays inside that, and passes by for ever.
        """
        wanted, post = self._wanted, self._post
        next_one = Listener(self.name, self.module, wanted, self._collector, self._directory, post)
        next_one._sites = self._sites
        return next_one

    def begin_step(self, owner: int) -> None:
        """Start counting calls from zero; only ``owner``'s thread is listened to."""
        self._count = self.elsewhere = 0
        self.owner = owner
        self._open.clear()

    @property
    def heard(self) -> bool:
        """Whether any call was captured."""
        return any(self._sites)

    def install(self) -> None:
        """Begin to listen."""
        module = self.module
        # TorchScript takes no hooks, and its own were compiled into its forward.
        if _has_hooks(module) and not isinstance(module, torch.jit.ScriptModule):
            self._handles = [
                module.register_forward_pre_hook(self.before, with_kwargs=True),
                module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            ]
            return
        own = vars(module)
        self._forward = module.forward
        self._replaced = own.get("forward")
        own["forward"] = self
        self._installed = True

    def remove(self) -> None:
        """Leave the module as it was. What somebody has wrapped around us meanwhile stays, and passes by."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        own = vars(self.module)
        self.wrapped_by_others = self._installed and own.get("forward") is not self
        self._installed = False
        if own.get("forward") is self:
            before = self._replaced
            while isinstance(before, Listener) and not before._installed:
                before = before._replaced
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect.signature` shows for the module's ``forward``."""
        return self._forward

    def __getattr__(self, name: str) -> Any:
        """Nothing more than what is there; TorchScript, which asks for ``__globals__``, hears why."""
        raise no_function(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the module is not captured."""
        copy = memo.get(id(self.module))
        return Uncaptured(copy if copy is not None else self.module)

    def __reduce__(self) -> tuple[type[Uncaptured], tuple[nn.Module]]:
        return (Uncaptured, (self.module,))

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
        if _is_compiling():
            return self._forward(*args, **kwargs)
        if _get_ident() != self.owner:
            # Seldom, so that it costs nothing to look whether a step is in progress.
            self.elsewhere += bool(self.owner)
            return self._forward(*args, **kwargs)
        call = self._count
        self._count = call + 1
        sides = self._sites[call] if call < len(self._sites) else self._new_call()
        if sides is None:
            return self._forward(*args, **kwargs)
        collector = self._collector
        collector.inputs(sides, args, kwargs)
        try:
            output = self._forward(*args, **kwargs)
        except BaseException as error:
            if self.owner:
                collector.raised(sides, error)
                if self._post:
                    collector.post_fwd_inputs(sides, args, kwargs)
            raise
        # The step may have ended inside the call.
        if self.owner:
            collector.outputs(sides, output)
            if self._post:
                collector.post_fwd_inputs(sides, args, kwargs)
        return output

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if _is_compiling():
            return
        if _get_ident() != self.owner:
            self.elsewhere += bool(self.owner)
            return
        call = self._count
        self._count = call + 1
        sides = self._sites[call] if call < len(self._sites) else self._new_call()
        self._open.append(sides)
        if sides is not None:
            self._collector.inputs(sides, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook; also called, with no output, when the module raised."""
        if _is_compiling() or _get_ident() != self.owner or not self._open:
            return
        sides = self._open.pop()
        if sides is None:
            return
        error = raised_by(module, output)
        if error is not None:
            self._collector.raised(sides, error)
        else:
            self._collector.outputs(sides, output)
        if self._post:
            self._collector.post_fwd_inputs(sides, args, kwargs)


class RootListener(Listener):
    """The captured model's own, where a step begins inside the model's call and can add no hook to that.

    Its `before` and `after` are called by hooks that stay for the whole capture (`RootHooks`).
    """

    def install(self) -> None:
        """The hooks are there already."""

    def remove(self) -> None:
        """They stay."""


class Uncaptured:
    """What stands for a listener in a copy of a captured module: its class's own ``forward``."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``."""
        return type(self._module).forward(self._module, *args, **kwargs)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def raised_by(module: nn.Module, output: Any) -> BaseException | None:
    """The exception that ended a module's call early, seen from its forward hook; None if it returned.

    A module may return None while a caller handles some older exception: only an exception whose
    traceback passed through the module's own call was raised by it.
    """
    if output is not None:
        return None
    error = sys.exc_info()[1]
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        if _is_call_of(trace.tb_frame, module):
            return error
        trace = trace.tb_next
    return None


def open_calls(module: nn.Module) -> int:
    """How many calls of ``module`` are on this thread's stack; seen from its hook, that call included."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        count += _is_call_of(frame, module)
        frame = frame.f_back
    return count


def _is_call_of(frame: FrameType, module: nn.Module) -> bool:
    return frame.f_code is _CALL_CODE and frame.f_locals.get("self") is module


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


class ListenerSet:
    """All listeners of one attached model; there for a step, gone when the next one is not selected."""

    def __init__(self, listeners: Mapping[nn.Module, Listener]) -> None:
        self._listeners = list(listeners.values())
        self._installed = False

    @property
    def elsewhere(self) -> dict[str, int]:
        """How many calls of which module the step had in threads other than its own."""
        return {each.name: each.elsewhere for each in self._listeners if each.elsewhere}

    @property
    def heard(self) -> dict[str, bool]:
        """Of each module, whether any call was captured."""
        return {each.name: each.heard for each in self._listeners}

    def install(self) -> None:
        """Listen, unless that is still so from the step before; restart the counters."""
        if not self._installed:
            self._installed = True
            self._listeners = [
                listener.successor() if listener.wrapped_by_others else listener
                for listener in self._listeners
            ]
            for listener in self._listeners:
                listener.install()
        owner = _get_ident()
        for listener in self._listeners:
            listener.begin_step(owner)

    def resume(self) -> None:
        """Go on listening in a step after a rest; calls are counted on."""
        owner = _get_ident()
        for listener in self._listeners:
            listener.owner = owner

    def rest(self) -> None:
        """Stay for the next step, but pass over calls outside a step."""
        for listener in self._listeners:
            listener.owner = _NOBODY

    def remove(self) -> None:
        """Take every listener away."""
        self.rest()
        if self._installed:
            self._installed = False
            for listener in self._listeners:
                listener.remove()


def no_function(attribute: str) -> AttributeError:
    """The error for whoever takes what we put into a module for a function, as TorchScript does."""
    return AttributeError(
        f"no {attribute!r} here: this module is being captured by tlcore; if it is to be compiled to"
        " TorchScript, call torch.jit.script outside the capture"
    )


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError where a module is wrapped by ``torch.compile``: hooks do not run there."""
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__name__ == "OptimizedModule":
            where = f"module {name!r}" if name else "the model"
            raise CaptureError(
                f"{where} is compiled with torch.compile, and hooks do not run inside a compiled region; "
                "capture the original module before it is compiled"
            )
