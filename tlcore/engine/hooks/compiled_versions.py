"""What `torch.compile` made of a model's modules and the user keeps beside them: whether it was called.

Such an object runs past everything that stands in for the modules' own calls.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from ...hotpath.intercept import WHOLE_CALL, StandIn, without_dead
from .module_tree import ModuleTree

_ORIGINAL = "_orig_mod"
_is_compiling = torch.compiler.is_compiling


class CompiledVersions:
    """Notes calls of objects that `torch.compile` makes, or has made, of any module, while it looks on.

    ``heard`` says how many calls of the captured model were heard, and is None within a step, where the
    modules themselves tell what is compiled of them. One that runs eagerly after all is heard.
    """

    def __init__(self, heard: Callable[[], int | None]) -> None:
        self.heard = heard
        self._handle: RemovableHandle | None = None
        # By the module, so that none is kept alive.
        self._versions: list[weakref.ref[_Version]] = []
        self._called: dict[int, weakref.ref[nn.Module]] = {}

    def install(self) -> None:
        """Begin to look on."""
        for each in _made():
            self._note(each, each._modules.get(_ORIGINAL))
        self._handle = register_module_module_registration_hook(self._registered)

    def _registered(self, parent: nn.Module, key: str, part: nn.Module | None) -> None:
        if key == _ORIGINAL and type(parent).__name__ == "OptimizedModule":
            self._note(parent, part)

    def _note(self, version: nn.Module, original: nn.Module | None) -> None:
        if original is not None:
            each = _Version(version, original, self)
            each.put()
            self._versions.append(weakref.ref(each))

    def called(self, original: nn.Module) -> None:
        """What was made of a module is called."""
        self._called[id(original)] = weakref.ref(original)

    def remove(self) -> None:
        """Leave everything as it was."""
        if self._handle is not None:
            self._handle.remove()
        for reference in reversed(self._versions):
            each = reference()
            if each is not None:
                each.take_away()
                each.dead = True
        self._versions = []

    def names(self, tree: ModuleTree) -> list[str]:
        """The modules of a model that are in something compiled which was called."""
        called = [original for known in self._called.values() if (original := known()) is not None]
        within = {id(each) for original in called for each in original.modules()}
        return [each.name for each in tree.modules if id(each.module) in within]


class _Made:
    """All the objects that `torch.compile` has made of modules; none where it was never asked for.

    Looking at every object of a process takes a good part of a second in a large one, and each capture asks.
    So it is done again only where more or fewer hold the class than last time: each object of it does.
    """

    def __init__(self) -> None:
        self._found: list[weakref.ref[Any]] = []
        self._others = -1

    def __call__(self) -> list[Any]:
        eval_frame = sys.modules.get("torch._dynamo.eval_frame")
        cls = getattr(eval_frame, "OptimizedModule", None)
        if cls is None:
            return []
        alive = [each for known in self._found if (each := known()) is not None]
        others = sys.getrefcount(cls) - len(alive)
        if others != self._others or not getattr(sys, "_is_gil_enabled", lambda: True)():
            alive = [each for each in gc.get_objects() if type(each) is cls]
            self._found = [weakref.ref(each) for each in alive]
            self._others = sys.getrefcount(cls) - len(alive)
        return alive


_made = _Made()


class _Version(StandIn):
    """Stands in for the call of one of them."""

    __slots__ = ("_of", "_versions")

    def __init__(self, version: nn.Module, original: nn.Module, versions: CompiledVersions) -> None:
        super().__init__(version, WHOLE_CALL, without_dead(vars(version).get(WHOLE_CALL)))
        self._of = weakref.ref(original)
        self._versions = versions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.original(*args, **kwargs)
        before = None if self.dead else self._versions.heard()
        result = self.now()(*args, **kwargs)
        original = self._of()
        if original is not None and before is not None and self._versions.heard() == before:
            self._versions.called(original)
        return result
