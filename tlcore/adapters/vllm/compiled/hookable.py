"""Making hooks run on vLLM's compilable modules, whose call goes past them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .eager_steps import runs_eagerly

_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def make_hookable(model: nn.Module) -> None:
    """Let modules of ``@support_torch_compile`` classes run forward hooks wherever they run eagerly.

    Their ``__call__`` goes straight to ``forward``, or to what was compiled. Each such instance gets a
    subclass of its own class that calls as any module does unless compiled code is to run; name,
    attributes and ``isinstance`` stay as they were.
    """
    for module in model.modules():
        cls = type(module)
        if cls.__call__ is not nn.Module.__call__ and hasattr(module, "do_not_compile"):
            module.__class__ = _with_plain_call(cls)


def _with_plain_call(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls``, the same one each time, that is called as any module where it is eager."""
    if cls in _subclasses:
        return _subclasses[cls]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.do_not_compile or (not torch.compiler.is_compiling() and runs_eagerly()):
            return nn.Module.__call__(self, *args, **kwargs)
        return cls.__call__(self, *args, **kwargs)

    namespace = {
        "__call__": call,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    _subclasses[cls] = type(cls.__name__, (cls,), namespace)
    return _subclasses[cls]
