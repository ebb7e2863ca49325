"""Making hooks run on vLLM's compilable modules, whose call goes past them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .frontend import unknown_vllm

_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def make_hookable(model: nn.Module) -> None:
    """Let modules of ``@support_torch_compile`` classes run forward hooks; eager mode only.

    Their ``__call__`` goes straight to ``forward``. Each such instance gets a subclass of its own
    class that calls as any module does; name, attributes and ``isinstance`` stay as they were. Raises
    CaptureError when an instance is set to compile.
    """
    for name, module in model.named_modules():
        cls = type(module)
        if cls.__call__ is nn.Module.__call__ or not hasattr(module, "do_not_compile"):
            continue
        if not module.do_not_compile:
            raise unknown_vllm(f"module {name!r} ({cls.__name__}) is set to compile in eager mode")
        module.__class__ = _with_plain_call(cls)


def _with_plain_call(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls``, the same one each time, that is called as any module."""
    if cls in _subclasses:
        return _subclasses[cls]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    namespace = {
        "__call__": call,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    _subclasses[cls] = type(cls.__name__, (cls,), namespace)
    return _subclasses[cls]
