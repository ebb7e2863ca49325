"""Functions that `torch.compile` made, whoever keeps them: whether one that reaches captured modules ran.

What such a function made of modules before the capture began runs past all that stands in for their calls,
and nothing compiles it anew. Every one of them asks its compiler's module how it is to run, so there is heard
which one it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any

from torch import nn

from .tap_point import COMPILED_CALL, ORIGINAL, taps_left_out

_COMPILER, _ASKED = "torch._dynamo.eval_frame", "_callback_from_stance"
# Where such a function keeps the list of what it does at its end.
_AT_END = "cleanups"
_MOST_DEPTH, _MOST_ITEMS = 4, 256
# Of how many calls of one function is looked at what it reaches.
_MOST_LOOKS = 8
_lock = threading.Lock()
_told: tuple[CompiledFunctions, ...] = ()


class CompiledFunctions:
    """Notes the functions called, while it looks on, that reach one of some modules.

    ``heard`` says how many calls of the captured model were heard, and is None within a step, where the
    modules themselves tell what is compiled of them. ``modules`` are the captured ones, by their identity.
    """

    def __init__(self, heard: Callable[[], int | None], modules: Callable[[], Mapping[int, str]]) -> None:
        self._heard = heard
        self._modules = modules
        self._looks: Counter[str] = Counter()
        # The functions by name and place, and the modules that each reaches.
        self.called: dict[str, list[str]] = {}
        # The taps that compiled code which ran within a step has left out.
        self.left_out: set[str] = set()

    def install(self) -> None:
        """Begin to look on."""
        global _told
        with _lock:
            _told = (*_told, self)
            _listen()

    def remove(self) -> None:
        """Leave everything as it was, if nobody else looks on."""
        global _told
        with _lock:
            _told = tuple(each for each in _told if each is not self)
            if not _told:
                _listen_no_more()

    def begins(self, function: Any, frame: FrameType) -> Callable[[], object]:
        """A function begins; what to call at its end."""
        before = self._heard()
        if before is None:
            return lambda: self.left_out.update(taps_left_out(function))
        given = [frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {})]
        return lambda: self._ends(function, given, before)

    def _ends(self, function: Any, given: list[Any], before: int) -> None:
        # Where modules run eagerly after all, they were heard.
        if self._heard() != before:
            return
        name = _shown(function)
        self._looks[name] += 1
        if name not in self.called and self._looks[name] <= _MOST_LOOKS:
            found = _reached(function, given, self._modules())
            if found:
                self.called[name] = found


def _shown(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _reached(function: Any, given: list[Any], modules: Mapping[int, str]) -> list[str]:
    """The names of captured modules that a function can come by, the outermost ones of each."""
    names: dict[str, None] = {}
    for each in _modules_in([function, *given]):
        parts = [each, *(part for part in each.modules() if part is not each)]
        name = next((modules[id(part)] for part in parts if id(part) in modules), None)
        if name is not None:
            names[name] = None
    return list(names)


def _modules_in(values: list[Any]) -> Iterator[nn.Module]:
    """The modules in arguments, closures, globals that the code names, and attributes of these."""
    seen: set[int] = set()
    level = values
    for _ in range(_MOST_DEPTH):
        following: list[Any] = []
        for value in level:
            if id(value) in seen or len(seen) > _MOST_ITEMS:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                yield value
            else:
                following += _parts(value)
        level = following


def _parts(value: Any) -> list[Any]:
    if value is None or isinstance(value, (str, bytes, int, float, type, ModuleType)):
        return []
    if isinstance(value, Mapping):
        return list(value.values())[:_MOST_ITEMS]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)[:_MOST_ITEMS]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    found = [getattr(value, "__self__", None), getattr(value, "__wrapped__", None)]
    code = getattr(value, "__code__", None)
    if code is not None:
        for cell in getattr(value, "__closure__", None) or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:
                continue
        known = getattr(value, "__globals__", {})
        found += [known[name] for name in code.co_names if name in known]
        found += [*(getattr(value, "__defaults__", None) or ())]
        found += [*(getattr(value, "__kwdefaults__", None) or {}).values()]
        return found
    return found + list(getattr(value, "__dict__", {}).values())[:_MOST_ITEMS]


class _Asked:
    """Stands in for what each compiled function calls at its begin."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, callback: Any) -> Any:
        chosen = self.original(callback)
        # Otherwise it runs eagerly.
        if chosen is not None:
            _quietly(functools.partial(_tell, sys._getframe(1)))()
        return chosen


def _tell(frame: FrameType) -> None:
    if frame.f_code.co_name != COMPILED_CALL:
        return
    values = frame.f_locals
    at_end = values.get(_AT_END)
    for each in _told:
        end = each.begins(values.get(ORIGINAL), frame)
        at_end.append(_quietly(end)) if isinstance(at_end, list) else end()


def _quietly(call: Callable[[], object]) -> Callable[[], object]:
    """What is only noted must not keep anybody's function from running."""

    def called() -> None:
        with contextlib.suppress(Exception):
            call()

    return called


def _listen() -> None:
    """Listen now, or as soon as the compiler is loaded, which takes seconds and is nothing to do for this."""
    compiler = sys.modules.get(_COMPILER)
    if compiler is not None:
        _stand_in(compiler)
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _stand_in(compiler: ModuleType) -> None:
    original = getattr(compiler, _ASKED, None)
    if original is not None and not isinstance(original, _Asked):
        setattr(compiler, _ASKED, _Asked(original))


def _listen_no_more() -> None:
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    compiler = sys.modules.get(_COMPILER)
    found = getattr(compiler, _ASKED, None)
    if isinstance(found, _Asked):
        setattr(compiler, _ASKED, found.original)


class _Finder:
    """Knows when the compiler is loaded."""

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The compiler's module, as Python finds it; nothing else."""
        if name != _COMPILER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return None
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            load(module)
            with _lock:
                if _told:
                    _stand_in(module)

        loader.exec_module = exec_module
        return spec


_FINDER = _Finder()
