"""Modules whose ``forward`` shows its arguments and results by taps, so that a compiler traces them along.

What is here runs while the model is traced: plain calls, no state that changes, nothing captured by a
closure. A graph that comes from a compilation cache has the taps in it already.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from .code_taps import enter, install_code_taps, leave, show


class Slots(NamedTuple):
    """A module's slots: one number for each tensor of a side, in the order of `tensors_of`."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    post_fwd_inputs: tuple[int, ...] = ()


_is_compiling = torch.compiler.is_compiling


def install_taps(
    module: nn.Module, slots: Slots, anchor: torch.Tensor, code: dict[str, tuple[int, ...]]
) -> None:
    """Let each call of ``module`` show its tensors; ``anchor`` is one element on the model's device.

    ``code`` has the slots of what its code shows by `tlcore.tap`.
    """
    own = vars(module)
    install_code_taps(module, code, anchor)
    own["_tlcore_slots"] = slots
    own["_tlcore_anchor"] = anchor
    if _compiles_itself(module):
        module.__class__ = _tapped_outside(type(module))
    else:
        own["_tlcore_forward"] = module.forward
        own["forward"] = MethodType(_tapped_forward, module)


def _compiles_itself(module: nn.Module) -> bool:
    """Whether the module's call goes to what was compiled of its ``forward``, which must stay as it is."""
    return type(module).__call__ is not nn.Module.__call__ and hasattr(module, "do_not_compile")


def _tapped_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    slots, anchor = self._tlcore_slots, self._tlcore_anchor
    show((args, kwargs), slots.inputs, anchor)
    output = _within(self._tlcore_number, self._tlcore_forward, args, kwargs)
    show(output, slots.outputs, anchor)
    show((args, kwargs), slots.post_fwd_inputs, anchor)
    return output


def _within(number: int, call: Any, args: Any, kwargs: Any) -> Any:
    """Call, with a note that what is shown by `tlcore.tap` meanwhile belongs to the module of a number."""
    enter(number)
    if _is_compiling():
        output = call(*args, **kwargs)
        leave(number)
        return output
    try:
        return call(*args, **kwargs)
    finally:
        leave(number)


def _tapped_outside(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose call shows what goes into the compiled ``forward`` and what comes out of it."""

    call_of_class = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        slots, anchor = self._tlcore_slots, self._tlcore_anchor
        show((args, kwargs), slots.inputs, anchor)
        output = _within(self._tlcore_number, call_of_class, (self, *args), kwargs)
        show(output, slots.outputs, anchor)
        show((args, kwargs), slots.post_fwd_inputs, anchor)
        return output

    names = {"__call__": call, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), {**names, "__qualname__": cls.__qualname__})
