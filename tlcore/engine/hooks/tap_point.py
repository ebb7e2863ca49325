"""`tlcore.tap`: a value that is no module's argument or result, shown by the model's own code."""

from __future__ import annotations

import logging
import sys
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

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> None:
        """Take a value that the code of ``frame`` shows; its memory is only lent."""
        ...

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """Take a value that the code of a module shows."""
        ...


_receivers: tuple[Receiver, ...] = ()
# What makes a value known to the graph that is being traced; None where nobody wants it to.
_tracer: Callable[[str, Any], None] | None = None


def tap(name: str, tensor: Value) -> Value:
    """Show ``tensor`` to whoever captures the module whose code calls this, and return it as it is.

    It is stored as ``<module>/tap.<name>``, with ``_1`` where the same call shows ``name`` for the second
    time, and so on; `module_call_match` finds it as ``<module>.tap.<name>``. Its values are those of now.
    While nothing is captured this costs one look. Compiled code takes part where a capture with
    ``"compiled": "taps"`` was there before it was compiled.
    """
    if _is_compiling():
        if _tracer is not None:
            _tracer(name, tensor)
        return tensor
    if _receivers:
        _show(name, tensor)
    return tensor


def _scripted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# What TorchScript compiles instead: its graphs run without Python, so nothing is shown there.
tap.__prepare_scriptable__ = lambda: _scripted  # type: ignore[attr-defined]


def _show(name: str, value: Any) -> None:
    frame = sys._getframe(2)
    for each in _receivers:
        try:
            each.tapped(name, value, frame)
        except Exception as error:
            log.warning("a tap could not be captured: %s: %s", type(error).__name__, error)


def show_traced(name: str, value: Any, module: nn.Module | None) -> None:
    """A graph runs that a value was traced into: of a module, or else of the one that runs now."""
    if module is None:
        _show(name, value)
        return
    for each in _receivers:
        each.tapped_in(name, value, module)


def trace_with(tracer: Callable[[str, Any], None] | None) -> None:
    """Let compilers trace taps along by ``tracer`` from now on, or leave them out."""
    global _tracer
    _tracer = tracer


def receive(receiver: Receiver) -> None:
    """Show taps to ``receiver``, too, until `receive_no_more`."""
    global _receivers
    if receiver not in _receivers:
        _receivers = (*_receivers, receiver)


def receive_no_more(receiver: Receiver) -> None:
    """Undo `receive`."""
    global _receivers
    if receiver in _receivers:
        _receivers = tuple(each for each in _receivers if each is not receiver)
