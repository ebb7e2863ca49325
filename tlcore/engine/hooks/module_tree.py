"""The modules of a model and all their names, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

# Modules that are shared again and again have names without end.
_MOST_ALIASES = 10_000
_children = itemgetter("_modules")


class Named(NamedTuple):
    """A module; ``name`` is the first one in `Module.named_modules`, ``aliases`` are the others."""

    name: str
    module: nn.Module
    aliases: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.name, *self.aliases)


class ModuleTree:
    """A model's modules in the order of `Module.named_modules`, the model itself with an empty name first."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(_walk(model))
        self.depth = max(each.name.count(".") for each in self.modules) + 2
        # TorchScript's modules stay as they are, and show their parts in another way.
        owns = [vars(m.module) for m in self.modules if not isinstance(m.module, torch.jit.ScriptModule)]
        self._owns = [own for own in owns if isinstance(own.get("_modules"), dict)]
        self._known = [dict(_children(own)) for own in self._owns]
        self._modules = [each.module for each in self.modules]
        self._types = list(map(type, self._modules))
        # Functions that a module's class gives it, which others may exchange for all modules at once.
        self._forwards = [(cls, getattr(cls, "forward", None)) for cls in set(self._types)]

    @property
    def classes(self) -> set[type]:
        """The modules' classes."""
        return set(self._types)

    def is_as_it_was(self) -> bool:
        """Whether every module is still of its class and has the very parts that it had."""
        try:
            for cls, known in self._forwards:
                if getattr(cls, "forward", None) != known:
                    return False
            return (
                list(map(_children, self._owns)) == self._known
                and list(map(type, self._modules)) == self._types
            )
        except Exception:
            # Another module stands there, and its class's own notion of equality failed.
            return False


def _walk(model: nn.Module) -> Iterator[Named]:
    """Without recursion: a model may be nested as deep as its own calls can just go."""
    names: dict[int, list[str]] = {}
    order: list[nn.Module] = []
    aliases = 0
    stack: list[tuple[str, nn.Module, Any]] = [("", model, None)]
    while stack:
        name, module, above = stack.pop()
        known = names.get(id(module))
        if known is None:
            names[id(module)] = [name]
            order.append(module)
        elif aliases < _MOST_ALIASES and not _lies_in(module, above):
            aliases += 1
            known.append(name)
        else:
            continue
        parts = [(key, part) for key, part in module._modules.items() if part is not None]
        prefix = f"{name}." if name else ""
        stack += [(prefix + key, part, (module, above)) for key, part in reversed(parts)]
    for module in order:
        first, *others = names[id(module)]
        yield Named(first, module, tuple(others))


def _lies_in(module: nn.Module, above: Any) -> bool:
    while above is not None:
        if above[0] is module:
            return True
        above = above[1]
    return False
