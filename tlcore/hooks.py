"""Hooks on the selected modules, alive only while a selected step runs."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import CaptureError
from .pipeline import Event
from .record import Direction
from .staging import Slot, Stager
from .structure import Branch, Opaque, class_name, freeze

log = logging.getLogger("tlcore")
_NOT_WANTED = -1
_NOBODY = 0
_CALL_CODE = nn.Module._call_impl.__code__
_OTHER_DEVICE = "device not in device_names"


@dataclass(frozen=True, slots=True)
class TensorFilter:
    """What decides about one tensor from its metadata; devices are ``str(device)``, sizes elements."""

    devices: frozenset[str]
    max_elements: int | None
    max_run_bytes: int | None


class Collector:
    """Gathers a step's events: freezes structures, stages tensors, hands over full batches."""

    def __init__(self, stager: Stager, tensors: TensorFilter, submit: Callable[[list[Event]], None]) -> None:
        self.calls: list[tuple[str, int]] = []
        self.events: list[Event] = []
        self.run_bytes = 0
        self._stager = stager
        self._filter = tensors
        self._submit = submit
        self._slots: list[Slot] = []
        self._kinds: dict[tuple[torch.device, torch.dtype, torch.layout], tuple[str, str | None]] = {}

    def begin_step(self) -> None:
        """Forget the step before."""
        self.calls = []
        self.events = []
        self._stager.begin_step()

    def enter(self, module: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins: its place in the order, and its inputs."""
        self.calls.append((module, call))
        self.arguments(module, call, "inputs", args, kwargs)

    def arguments(
        self, module: str, call: int, direction: Direction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Capture positional and keyword arguments as they stand now."""
        slots: list[Slot] = []
        self._slots = slots
        node = freeze(args, self._leaf)
        keywords = freeze(kwargs, self._leaf)
        self._add(Event(module, call, direction, node, keywords, slots))

    def result(self, module: str, call: int, output: Any) -> None:
        """Capture what the call returned."""
        slots: list[Slot] = []
        self._slots = slots
        node = freeze(output, self._leaf)
        self._add(Event(module, call, "outputs", node, None, slots))

    def raised(self, module: str, call: int, error: BaseException) -> None:
        """Note that the call raised instead of returning."""
        self._add(Event(module, call, "outputs", Opaque(f"raised {class_name(error)}"), None, ()))

    def broken(self, module: str, call: int, direction: Direction, error: Exception) -> None:
        """Book an event that could not be captured; what was staged of it stays accounted for."""
        reason = f"capture raised {type(error).__name__}"
        for slot in self._slots:
            if not (slot.skipped or slot.failed or slot.dropped):
                slot.failed = reason
        node = Branch("list", None, range(len(self._slots)), list(self._slots))
        self._add(Event(module, call, direction, node, None, self._slots))
        log.warning("%s of %s could not be captured: %s: %s", direction, module, type(error).__name__, error)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self._stager.has_full:
            self._submit(self.events)
            self.events = []

    def _leaf(self, tensor: torch.Tensor) -> Slot:
        kind = (tensor.device, tensor.dtype, tensor.layout)
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._judge(tensor)
        label, reason = known
        slot = Slot(kind[1], tensor.shape, label, 0)
        self._slots.append(slot)
        if reason is _OTHER_DEVICE:
            slot.counted = False
            slot.skipped = reason
            return slot
        try:
            if type(tensor) is not torch.Tensor or tensor.is_nested:
                reason = reason or _unsupported_class(tensor)
            slot.skipped = reason or self._too_much(tensor, slot)
            if slot.skipped is None:
                self._stager.stage(tensor, slot)
                if slot.chunk is not None:
                    self.run_bytes += slot.nbytes
        except Exception as error:
            slot.failed = f"copy raised {type(error).__name__}"
            log.debug("a tensor could not be copied", exc_info=True)
        return slot

    def _judge(self, tensor: torch.Tensor) -> tuple[str, str | None]:
        """The device's name, and why no tensor of this device, dtype and layout can be stored."""
        label = str(tensor.device)
        if self._filter.devices and label not in self._filter.devices:
            return label, _OTHER_DEVICE
        if tensor.layout is not torch.strided:
            return label, f"unsupported layout {tensor.layout}"
        if tensor.is_quantized:
            return label, "unsupported quantized dtype"
        if tensor.is_meta:
            return label, "meta tensor holds no data"
        return label, None

    def _too_much(self, tensor: torch.Tensor, slot: Slot) -> str | None:
        count = tensor.numel()
        slot.nbytes = count * tensor.element_size()
        limits = self._filter
        if limits.max_elements is not None and count > limits.max_elements:
            return "larger than max_tensor_size"
        if limits.max_run_bytes is not None and self.run_bytes + slot.nbytes > limits.max_run_bytes:
            return "max_run_bytes reached"
        return None


def _unsupported_class(tensor: torch.Tensor) -> str | None:
    """Why a tensor that is not a plain `torch.Tensor` has no bytes of its own to store, or None."""
    if tensor.is_nested:
        return "unsupported nested tensor"
    cls = type(tensor)
    if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"unsupported tensor class {cls.__name__}"
    return None


class ModuleHooks:
    """One module's pair of hooks, its call counter and the calls now open (it may be recursive)."""

    __slots__ = ("_collector", "_open", "_post", "_wanted", "count", "name", "owner")

    def __init__(
        self, name: str, wanted: frozenset[int] | Literal["all"], collector: Collector, post_inputs: bool
    ) -> None:
        self.name = name
        self.count = 0
        self.owner = _NOBODY
        self._wanted = wanted
        self._collector = collector
        self._post = post_inputs
        self._open: list[int] = []

    def begin_step(self, owner: int) -> None:
        """Start counting calls from zero; only ``owner``'s thread is listened to."""
        self.count = 0
        self.owner = owner
        self._open.clear()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if threading.get_ident() != self.owner or torch.compiler.is_compiling():
            return
        call = self.count
        self.count = call + 1
        if self._wanted != "all" and call not in self._wanted:
            self._open.append(_NOT_WANTED)
            return
        self._open.append(call)
        try:
            self._collector.enter(self.name, call, args, kwargs)
        except Exception as error:
            self._collector.broken(self.name, call, "inputs", error)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook; also called, with no output, when the module raised."""
        if threading.get_ident() != self.owner or torch.compiler.is_compiling() or not self._open:
            return
        call = self._open.pop()
        if call == _NOT_WANTED:
            return
        collector = self._collector
        direction: Direction = "outputs"
        try:
            error = raised_by(module, output)
            if error is not None:
                collector.raised(self.name, call, error)
            else:
                collector.result(self.name, call, output)
            if self._post:
                direction = "post_fwd_inputs"
                collector.arguments(self.name, call, direction, args, kwargs)
        except Exception as failure:
            collector.broken(self.name, call, direction, failure)


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


class HookSet:
    """All hooks of one attached model; installed for a step, removed when the next is not selected."""

    def __init__(self, hooks: Mapping[nn.Module, ModuleHooks]) -> None:
        self._hooks = hooks
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Register the hooks, unless they are still there from the step before; restart the counters."""
        owner = threading.get_ident()
        for hooks in self._hooks.values():
            hooks.begin_step(owner)
        if self._handles:
            return
        for module, hooks in self._hooks.items():
            self._handles.append(module.register_forward_pre_hook(hooks.before, with_kwargs=True))
            self._handles.append(
                module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
            )

    def rest(self) -> None:
        """Keep the hooks for the next step, but let them pass over calls outside a step."""
        for hooks in self._hooks.values():
            hooks.owner = _NOBODY

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


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
