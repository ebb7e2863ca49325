"""Calls that compute nothing real, since somebody only traces them, and who is told of them.

What a compiler, an exporter or a tracer makes of a module runs later without Python, so that it can only be
said that there is such a thing.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...hotpath.listening import is_symbolic
from ..staging.accelerator import recording

_MODE = torch._C._TorchDispatchModeKey
# With those of tracers.
_count_of_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_transforms = torch._C._functorch.peek_interpreter_stack
# Old releases, which do not have this, trace neither a listener's call nor tell an export from a compilation.
TRACES = hasattr(torch.compiler, "is_exporting")
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
# Has the flag that `is_compiling` tells of where nothing is traced by torch.compile, as here.
_compiler = torch.compiler
COMPILED, EXPORTED = "torch.compile", "torch.export"
SYMBOLIC = "torch.fx.symbolic_trace"
TRANSFORMED = "a torch.func transform (vmap, grad, ...)"
INFERRED = "a pipeline stage's inference of shapes"
# What runs a stage's module to learn shapes alone, in releases from 2.5 on: mostly with memory that nobody
# has written (torch/distributed/pipelining/stage.py).
_STAGE = "torch.distributed.pipelining.stage"
_INFERRING = frozenset(("_shape_inference", "_forward_metadata_inference"))
# Between that and the module's own call lie those of what wraps it.
_MOST_FRAMES = 64


def why_traced() -> str | None:
    """By what a call is traced now; None for one that computes."""
    if _compiler._is_compiling_flag:
        return EXPORTED if is_exporting() else COMPILED
    if _is_tracing():
        return "torch.jit.trace"
    if _count_of_modes():
        modes = torch._C._get_dispatch_mode
        if modes(_MODE.FAKE) is not None or modes(_MODE.PROXY) is not None:
            return "tracing with fake tensors or proxies"
    return SYMBOLIC if is_symbolic() else None


def why_not_real() -> str | None:
    """Why a call now cannot be captured, such as one that is only traced; None for an ordinary call."""
    # Asked in each step: what `why_traced` asks is looked at first, which takes fewer calls of Python.
    if _compiler._is_compiling_flag or _is_tracing() or _count_of_modes() or is_symbolic():
        reason = why_traced()
        if reason is not None:
            return reason
    if _transforms() is not None:
        return TRANSFORMED
    if recording():
        return "a CUDA graph being captured"
    return INFERRED if _STAGE in sys.modules and _infers_shapes() else None


def _infers_shapes() -> bool:
    frame = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame.f_code.co_name in _INFERRING and frame.f_globals.get("__name__") == _STAGE:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class Told(Protocol):
    """Who is told that its call is traced."""

    def is_traced(self, reason: str) -> object:
        """It is, by what ``reason`` says."""
        ...


class PassedBy:
    """Which modules' calls were traced, and by what."""

    def __init__(self) -> None:
        self.by: dict[str, dict[str, None]] = {}

    def note(self, name: str, reason: str) -> None:
        """A module's call is traced."""
        self.by.setdefault(reason, {})[name] = None

    def add(self, other: PassedBy) -> None:
        """What another one knows, too."""
        for reason, names in other.by.items():
            self.by.setdefault(reason, {}).update(names)


_next = itertools.count(1)
# By a string, which a compiler takes for a constant.
_told: weakref.WeakValueDictionary[str, Told] = weakref.WeakValueDictionary()


def key_of(each: Told) -> str:
    """By which `compiles` finds who is to be told."""
    key = str(next(_next))
    _told[key] = each
    return key


def compiles(key: str) -> None:
    """The call of whoever has this key is compiled or exported. Traced along, and leaves nothing behind."""
    if not torch.compiler.is_dynamo_compiling():
        _tell(key)
    elif TRACES:
        torch._dynamo.comptime.comptime(_tell_traced)


def _tell_traced(context: Any) -> None:
    _tell(context.get_local("key").as_python_constant())


def _tell(key: str) -> None:
    each = _told.get(key)
    if each is not None:
        each.is_traced(EXPORTED if is_exporting() else COMPILED)
