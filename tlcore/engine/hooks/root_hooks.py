"""The hooks on a captured model itself: its outermost call is one step, and only where it really computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import CaptureError
from ..staging.accelerator import recording
from .listening import RootListener, no_function, open_calls, raised_by, refuse_compiled

log = logging.getLogger("tlcore")
_MODE = torch._C._TorchDispatchModeKey


def refuse_unreachable(model: nn.Module) -> None:
    """Raise CaptureError for a model whose modules are called without Python: compiled, or TorchScript."""
    refuse_compiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is TorchScript, which calls its modules without Python; capture the original nn.Module"
            " (torch.jit.script or torch.jit.trace it afterwards)"
        )
    scripted = next(
        (n for n, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None
    )
    if scripted is not None:
        log.warning(
            "module %r is TorchScript: it is captured as a whole, the modules in it are not", scripted
        )


def why_not_real() -> str | None:
    """Why a call now computes nothing real, such as one that is only traced; None for an ordinary call."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export"
    if torch._C._is_tracing():
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform (vmap, grad, ...)"
    modes = torch._C._get_dispatch_mode
    if modes(_MODE.FAKE) is not None or modes(_MODE.PROXY) is not None:
        return "tracing with fake tensors or proxies"
    if recording():
        return "a CUDA graph being captured"
    return None


class RootHooks:
    """Calls ``begin`` before and ``end`` after each outermost call of a model, on one thread at a time.

    ``end`` gets the exception that ended the call, or None. What they raise is logged, not raised: the
    model's call goes on. Calls in other threads meanwhile, and calls that compute nothing real, pass by.
    """

    def __init__(self, begin: Callable[[], object], end: Callable[[BaseException | None], object]) -> None:
        self._begin = begin
        self._end = end
        self._depth = 0
        self._owner = 0
        self._lock = threading.Lock()
        self._handles: list[RemovableHandle] = []
        self._root: RootListener | None = None
        self._seen: list[tuple[Any, ...]] = []
        self._said: set[str] = set()
        self.calls = 0

    def install(self, model: nn.Module, root: RootListener | None = None) -> None:
        """Begin to listen to ``model``; ``root`` is told of its calls, to capture them."""
        self._root = root
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._before), prepend=True),
            model.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
        ]
        if root is not None:
            # Behind everybody else's, which may change the arguments.
            self._handles.append(model.register_forward_pre_hook(_Hook(self._taken), with_kwargs=True))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, args: Any) -> None:
        # Asked first, and alone: torch.compile traces this and must not meet anything else.
        if torch.compiler.is_compiling():
            return
        reason = why_not_real()
        if reason is not None:
            self._say_once(f"a call of the model within {reason} is not captured")
            return
        thread = threading.get_ident()
        with self._lock:
            if self._depth and thread != self._owner:
                self._say_once("the model runs in several threads at once; only one of them is captured")
                return
            # An interrupt skips the hook that ends a call, so a depth left over is checked, not trusted.
            self._depth = open_calls(module) if self._depth else 1
            self._owner = thread
            outermost = self._depth == 1
        if outermost:
            self.calls += 1
            self._seen.clear()
            self._stay_behind(module)
            self._guarded(self._begin)

    def _stay_behind(self, module: nn.Module) -> None:
        """Let our last hooks be the last ones, though others were added since."""
        for handle in self._handles[1:]:
            # Of arguments, those of the next call: this one's hooks are decided already.
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                if handle.id in hooks:
                    hooks[handle.id] = hooks.pop(handle.id)

    def _taken(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._root is not None and not self._passes_by():
            self._seen.append((*args, *kwargs.values()))
            self._root.before(module, args, kwargs)

    def _passes_by(self) -> bool:
        """Whether a hook's call is none of a step."""
        if torch.compiler.is_compiling() or threading.get_ident() != self._owner or not self._depth:
            return True
        return why_not_real() is not None

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._passes_by():
            return
        if self._root is not None:
            self._check_arguments(args, kwargs)
            self._root.after(module, args, kwargs, output)
        self._depth -= 1
        if self._depth == 0:
            error = raised_by(module, output)
            self._guarded(lambda: self._end(error))

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = self._seen.pop() if self._seen else ()
        now = (*args, *kwargs.values())
        if len(seen) != len(now) or any(a is not b for a, b in zip(seen, now, strict=True)):
            self._say_once(
                "a hook that was added to the model since its last call changed the model's arguments; in the"
                " run stand those of this call as they were before that hook, of later calls as after it"
            )

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._say_once(f"a step could not be captured: {type(error).__name__}: {error}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


class _Hook:
    """A hook that stays behind when its module is copied or pickled."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __getattr__(self, name: str) -> Any:
        raise no_function(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return pass_by

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_pass_by, ())


def pass_by(*args: Any) -> None:
    """What stands for a hook of ours in a copy of a captured model: nothing."""


def _pass_by() -> Callable[..., None]:
    return pass_by


def compiled_meanwhile(model: nn.Module) -> str | None:
    """The name of a module that `torch.compile` has wrapped since the capture began; None without one."""
    try:
        refuse_compiled(model)
    except CaptureError as error:
        return str(error).partition(",")[0]
    return None
