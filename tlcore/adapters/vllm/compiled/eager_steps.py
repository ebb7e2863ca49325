"""Compiled engines: running a captured step eagerly, and keeping the rest of vLLM's compilation untouched."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import ModuleType
from typing import Any

from ..carrier import KEY, carried
from ..frontend.check import unknown_vllm

# The carrier's key for the table of what each tap's slot is; there once the model is tapped.
TAPS = "taps"
_MARK = "__tlcore__"
_SECOND_DISPATCH = "dispatch_cg_and_sync_dp"


class _Switch(threading.local):
    """Whether the step that runs in this thread is to be eager, how many forward passes were, who is told."""

    on = False
    passes = 0
    told: tuple[weakref.WeakMethod[Callable[[], None]], ...] = ()


_switch = _Switch()


def patch_hash(module: ModuleType) -> None:
    """Keep what does not change the compiled model out of ``VllmConfig.compute_hash``. Safe to repeat.

    vLLM hashes the whole ``additional_config``. With another ``output_dir`` or other steps it would
    otherwise compile the model anew at each start.
    """
    cls = module.VllmConfig
    original = cls.compute_hash
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> Any:
        if carried(self.additional_config) is None:
            return original(self, *args, **kwargs)
        view = copy.copy(self)
        view.additional_config = _hashed(self.additional_config)
        return original(view, *args, **kwargs)

    compute_hash.__dict__[_MARK] = True
    cls.compute_hash = compute_hash


def _hashed(additional_config: dict[str, Any]) -> dict[str, Any]:
    """``additional_config`` with only that of our configuration which changes the compiled model."""
    hashed = {key: item for key, item in additional_config.items() if key != KEY}
    given = carried(additional_config)
    taps = given.get(TAPS) if isinstance(given, Mapping) else None
    return hashed if taps is None else {**hashed, KEY: {TAPS: taps}}


class EagerSteps:
    """Runs chosen steps of a model runner eagerly; all others stay as compiled as they were.

    vLLM has the switch: a forward context with ``skip_compiled`` runs the modules themselves. Raises
    CaptureError, naming the vLLM version, where that switch or the one for CUDA graphs is not found.
    """

    def __init__(self, runner: Any) -> None:
        import vllm.forward_context

        _patch_forward_context(vllm.forward_context)
        _keep_out_of_graphs(runner)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run what is called in the block eagerly."""
        _switch.on, _switch.passes = True, 0
        try:
            yield
        finally:
            _switch.on = False

    @property
    def ran(self) -> bool:
        """Whether the last step's model was really run eagerly, rather than replayed from a graph."""
        return _switch.passes > 0


def when_pass_begins(tell: Callable[[], None]) -> None:
    """Call the method ``tell`` at the beginning of each forward pass in this thread, while its object lives.

    An `EagerSteps` must have been made before.
    """
    alive = [reference for reference in _switch.told if reference() is not None]
    _switch.told = (*alive, weakref.WeakMethod(tell))


def _patch_forward_context(module: ModuleType) -> None:
    """Set ``skip_compiled`` in each forward context that is made in an eager step. Safe to repeat."""
    original = getattr(module, "create_forward_context", None)
    known = {field.name for field in fields(module.ForwardContext)}
    if original is None or "skip_compiled" not in known:
        raise unknown_vllm("its forward context has no skip_compiled, so no single step can run eagerly")
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_forward_context(*args: Any, **kwargs: Any) -> Any:
        context = original(*args, **kwargs)
        if _switch.on:
            context.skip_compiled = True
            _switch.passes += 1
        for reference in _switch.told:
            if (tell := reference()) is not None:
                tell()
        return context

    create_forward_context.__dict__[_MARK] = True
    module.__dict__["create_forward_context"] = create_forward_context


def _keep_out_of_graphs(runner: Any) -> None:
    """Let the runner choose no CUDA graph for an eager step. Safe to repeat."""
    choose = getattr(runner, "_determine_batch_execution_and_padding", None)
    if choose is not None and "force_eager" in inspect.signature(choose).parameters:
        runner._determine_batch_execution_and_padding = _with_keyword(choose, "force_eager")
        return
    for cls in type(runner).__mro__:
        module = sys.modules[cls.__module__]
        choose = getattr(module, _SECOND_DISPATCH, None)
        if choose is not None and "need_eager" in inspect.signature(choose).parameters:
            setattr(module, _SECOND_DISPATCH, _with_keyword(choose, "need_eager"))
            return
    raise unknown_vllm(f"{type(runner).__name__} does not let a single step run without CUDA graphs")


def _with_keyword(original: Callable[..., Any], keyword: str) -> Callable[..., Any]:
    if hasattr(original, _MARK):
        return original

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if _switch.on:
            kwargs[keyword] = True
        return original(*args, **kwargs)

    choose.__dict__[_MARK] = True
    return choose
