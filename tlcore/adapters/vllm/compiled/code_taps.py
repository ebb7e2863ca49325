"""`tlcore.tap` in the code of tapped modules: its values go to slots, in code that is compiled and else.

Which slots these are depends on the module that runs. A compiler asks for them while it traces, as for any
constant, so that nothing of this is left in the graph but the operator that shows the value.
"""

from __future__ import annotations

import logging
import threading
import weakref
from itertools import count
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

from ....engine.hooks import tap_point
from ....engine.hooks.tap_op import tap

log = logging.getLogger("vllm.tlcore")
_NUMBER, _SLOTS = "_tlcore_number", "_tlcore_code_slots"
_next = count(1)
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
# One that taps of modules do not use, since a compiler must know it by one name. Any device's will do.
_anchor = torch.zeros(1)
_unplanned: set[tuple[str, str]] = set()


class _Running(threading.local):
    """The numbers of the tapped modules whose code this thread runs, the innermost last."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


_running = _Running()


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found.extend(tensors_of(item))
    return found


def install_code_taps(module: nn.Module, slots: dict[str, tuple[int, ...]], anchor: torch.Tensor) -> None:
    """Let what the code of ``module`` shows go to ``slots``, those of each tap by its name."""
    global _anchor
    if _anchor.device != anchor.device:
        _anchor = torch.zeros(1, device=anchor.device)
    own = vars(module)
    own[_SLOTS] = slots
    number = own[_NUMBER] = next(_next)
    _modules[number] = module
    tap_point.trace_with(_trace)
    tap_point.receive(_RECEIVER)


def enter(number: int) -> None:
    """The code of a tapped module begins, or is traced from here on."""
    _numbers().append(number)


def leave(number: int) -> None:
    """The end of what `enter` began, however it ends."""
    numbers = _numbers()
    while numbers and numbers.pop() != number:
        pass


def _numbers() -> list[int]:
    """Of what runs; within a trace of what is traced, which is forgotten where a trace begins anew."""
    context = TracingContext.try_get()
    if context is None:
        return _running.numbers
    found: list[int] = vars(context).setdefault("_tlcore_numbers", [])
    return found


def slots_of(name: str, traced: bool) -> tuple[int, ...] | None:
    """Where the running code's values of this name go; None where nothing was planned for them."""
    numbers = _numbers() or _running.numbers
    module = _modules.get(numbers[-1]) if numbers else None
    if module is None:
        return None
    slots: dict[str, tuple[int, ...]] = vars(module)[_SLOTS]
    found = slots.get(name)
    if found is None and traced:
        _say_unplanned(name, type(module).__name__)
    return found


def _say_unplanned(name: str, module: str) -> None:
    if (name, module) not in _unplanned:
        _unplanned.add((name, module))
        log.warning(
            "tlcore.tap(%r) in or below a %s did not come by when the model was tried before it was compiled:"
            " it is not captured",
            name,
            module,
        )


for _constant in (enter, leave, slots_of):
    # Called when the code is compiled, and not when it runs.
    vars(_constant)["_dynamo_marked_constant"] = True


def _trace(name: str, value: Any) -> bool:
    """Let the graph show a value, if there are slots for it. Traced: plain code only."""
    slots = slots_of(name, True)
    if slots:
        show(value, slots, _anchor)
    return slots is not None


def show(value: Any, slots: tuple[int, ...], anchor: torch.Tensor) -> None:
    """Show a value's tensors at their slots. Traced: plain code only."""
    if slots:
        tensors = tensors_of(value)
        for i in range(len(slots)):
            # Another value of the same name, or call of the same module, may have more tensors.
            if i < len(tensors):
                tap(tensors[i], anchor, slots[i])


class _Receiver:
    """Takes what code shows that runs eagerly."""

    def tapped(self, name: str, value: Any, frame: FrameType | None) -> bool:
        """Take a value, if there are slots for it; nobody else is to have it then."""
        slots = slots_of(name, False)
        if slots:
            show(value, slots, _anchor)
        return slots is not None

    def tapped_in(self, name: str, value: Any, module: nn.Module) -> None:
        """Code that another capture has traced along is none of ours."""


_RECEIVER = _Receiver()
