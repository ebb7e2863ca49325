"""`tlcore.tap`: a value that is no module's argument or result, shown by the model's own code."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

log = logging.getLogger("tlcore")
Value = TypeVar("Value")
_is_compiling = torch.compiler.is_compiling


class Receiver(Protocol):
    """Who takes what taps show while a step runs; must not raise, and must copy what it wants to keep."""

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> bool:
        """Take a value that the code of ``frame`` shows; its memory is only lent.

        True where those who came to receive later are not to have it.
        """
        ...

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """Take a value that the code of a module shows."""
        ...


_receivers: tuple[Receiver, ...] = ()
# Each makes a value known to the graph that is being traced, or says that it is none of its own.
Tracer = Callable[[str, Any], bool]
_tracers: tuple[Tracer, ...] = ()
# What a function compiled with torch.compile runs first, and what that calls its original.
COMPILED_CALL, ORIGINAL = "compile_wrapper", "fn"
# The taps in no graph, of compiled functions: by the object whose method one is, if any, and by its code.
_left_out: weakref.WeakKeyDictionary[Any, dict[Any, set[str]]] = weakref.WeakKeyDictionary()


def tap(name: str, tensor: Value) -> Value:
    """Show ``tensor`` to whoever captures the module whose code calls this, and return it as it is.

    It is stored as ``<module>/tap.<name>``, with ``_1`` where the same call shows ``name`` for the second
    time, and so on; `module_call_match` finds it as ``<module>.tap.<name>``. Its values are those of now.
    While nothing is captured this costs one look. Compiled code takes part where a capture with
    ``"compiled": "taps"`` was there before it was compiled.
    """
    if _is_compiling():
        traced = False
        for tracer in _tracers:
            traced = tracer(name, tensor) or traced
        if not traced:
            _leave_out(name)
        return tensor
    if _receivers:
        _show(name, tensor)
    return tensor


def taps_left_out(function: Any) -> set[str]:
    """The taps that a function's compiled code does not show."""
    anchor, code = _keys(function)
    return _left_out.get(anchor, {}).get(code, set())


def _keys(function: Any) -> tuple[Any, Any]:
    bound, code = getattr(function, "__self__", None), getattr(function, "__code__", None)
    return (code or function) if bound is None else bound, code


def _leave_out(name: str) -> None:
    """A compiler leaves a tap out: of the function that is compiled, in whose call it does so."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != COMPILED_CALL:
        frame = frame.f_back
    function = None if frame is None else frame.f_locals.get(ORIGINAL)
    if function is not None:
        anchor, code = _keys(function)
        with contextlib.suppress(TypeError):
            _left_out.setdefault(anchor, {}).setdefault(code, set()).add(name)


# Called when the code is compiled, and not when it runs.
_leave_out._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _scripted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# What TorchScript compiles instead: its graphs run without Python, so nothing is shown there.
tap.__prepare_scriptable__ = lambda: _scripted  # type: ignore[attr-defined]


def _show(name: str, value: Any) -> None:
    frame = sys._getframe(2)
    for each in _receivers:
        try:
            if each.tapped(name, value, frame):
                return
        except Exception as error:
            log.warning("a tap could not be captured: %s: %s", type(error).__name__, error)


def show_traced(name: str, value: Any, module: nn.Module | None) -> None:
    """A graph runs that a value was traced into: of a module, or else of the one that runs now."""
    if module is None:
        _show(name, value)
        return
    for each in _receivers:
        each.tapped_in(name, value, module)


def trace_with(tracer: Tracer) -> None:
    """Let compilers trace taps along by ``tracer``, too, until `trace_no_more`."""
    global _tracers
    if tracer not in _tracers:
        _tracers = (*_tracers, tracer)


def trace_no_more(tracer: Tracer) -> None:
    """Undo `trace_with`."""
    global _tracers
    _tracers = tuple(each for each in _tracers if each is not tracer)


def receive(receiver: Receiver) -> None:
    """Show taps to ``receiver``, too, until `receive_no_more`."""
    global _receivers
    if receiver not in _receivers:
        _receivers = (*_receivers, receiver)


def receive_no_more(receiver: Receiver) -> None:
    """Undo `receive`."""
    global _receivers
    if _receivers == (receiver,):
        # As nearly always, once a step.
        _receivers = ()
    elif receiver in _receivers:
        _receivers = tuple(each for each in _receivers if each is not receiver)
