"""Patching a module as soon as it is usable, whether it is not yet, partly or wholly imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]


def when_imported(name: str, patch: Patch) -> None:
    """Call ``patch(module)`` once the module is executed: now, or when its import ends.

    ``patch`` must be safe to repeat; a module may have several. A module in the midst of its import is
    patched at its first use afterwards, so that whoever gets hold of one of its attributes then gets it
    patched.
    """
    module = sys.modules.get(name)
    if module is None:
        _finder.wait_for(name, patch)
    elif _is_executing(module):
        module.__dict__.setdefault(_PENDING, []).append(patch)
        module.__class__ = _PatchedOnFirstUse
    else:
        patch(module)


_PENDING = "__tlcore_pending_patch__"


def _is_executing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _PatchedOnFirstUse(ModuleType):
    """A partly imported module: the first look at an attribute after its import runs the patch."""

    def __getattribute__(self, name: str) -> Any:
        namespace = ModuleType.__getattribute__(self, "__dict__")
        if not getattr(namespace["__spec__"], "_initializing", False):
            object.__setattr__(self, "__class__", ModuleType)
            for patch in namespace.pop(_PENDING, ()):
                patch(self)
        return ModuleType.__getattribute__(self, name)


class _PatchingLoader(Loader):
    """Loads a module as its own loader does, then patches it."""

    def __init__(self, loader: Loader, patches: list[Patch]) -> None:
        self._loader = loader
        self._patches = patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not see that it was loaded in a special way.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for patch in self._patches:
            patch(module)


class _Finder(MetaPathFinder):
    """Finds the awaited modules with the other finders, and swaps in a loader that patches."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Patch]] = {}

    def wait_for(self, name: str, patch: Patch) -> None:
        patches = self._waiting.setdefault(name, [])
        if patch not in patches:
            patches.append(patch)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patches = self._waiting.get(fullname)
        if patches is None:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader, patches)
                return spec
        return None


_finder = _Finder()
