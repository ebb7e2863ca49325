"""What of a model runs compiled, where no Python and so no listener of ours is reached."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...errors import CaptureError
from ...hotpath.intercept import WHOLE_CALL, is_stand_in
from .module_tree import ModuleTree, Named

log = logging.getLogger("tlcore")
_MOST_WRAPPERS = 20


def is_compiled(function: Any) -> bool:
    """Whether a function is what `torch.compile` made, or a wrapper that `functools` made around that."""
    for _ in range(_MOST_WRAPPERS):
        if function is None:
            return False
        if getattr(function, "_torchdynamo_disable", False):
            return False
        if getattr(function, "_torchdynamo_orig_callable", None) is not None:
            return True
        inner = getattr(function, "__wrapped__", None)
        function = function.func if inner is None and isinstance(function, functools.partial) else inner
    return False


def how_compiled(module: nn.Module) -> str | None:
    """By which spelling a module's calls run compiled; None where they do not."""
    own = vars(module)
    call: Any = own.get(WHOLE_CALL)
    while is_stand_in(call):
        call = call.replaced
    if call is not None:
        return "compiled with torch.compile"
    if type(module).__name__ == "OptimizedModule":
        return "compiled with torch.compile"
    if is_compiled(own.get("forward", getattr(type(module), "forward", None))):
        return "compiled with torch.compile, by its forward"
    return None


def compiled_parts(modules: Iterable[Named]) -> dict[str, str]:
    """How each module runs compiled that does."""
    found = ((each.name, how_compiled(each.module)) for each in modules)
    return {name: how for name, how in found if how is not None}


def shown(name: str) -> str:
    """A module's name in a sentence."""
    return f"module {name!r}" if name else "the model"


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError where a module is wrapped by ``torch.compile``: nothing is heard in there."""
    for name, how in compiled_parts(ModuleTree(model).modules).items():
        raise CaptureError(
            f"{shown(name)} is {how} already, and hooks do not run inside a compiled region; capture the"
            ' original module, with "compiled": "taps", and compile it inside the capture\'s `with` block'
        )


def refuse_unreachable(model: nn.Module) -> None:
    """Raise CaptureError for a model whose modules are called without Python: compiled, or TorchScript."""
    refuse_compiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is TorchScript, which calls its modules without Python; capture the original nn.Module"
            " (torch.jit.script or torch.jit.trace it afterwards)"
        )
    parts = ModuleTree(model).modules
    scripted = next((each.name for each in parts if isinstance(each.module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        log.warning(
            "module %r is TorchScript: it is captured as a whole, the modules in it are not", scripted
        )
    for each in parts:
        if isinstance(each.module, nn.DataParallel) and len(each.module.device_ids or ()) > 1:
            raise CaptureError(
                f"{shown(each.name)} is nn.DataParallel over several devices, which copies its module for"
                " each call; capture the module inside it on one device, or use DistributedDataParallel"
            )
