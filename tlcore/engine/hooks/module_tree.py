"""The modules of a model and all their names, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Container, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

# Modules that are shared again and again have names without end.
_MOST_ALIASES = 10_000
# What PyTorch itself keeps in each module, where its parts are told apart from all else.
_OF_TORCH = frozenset(vars(nn.Module()))
_HOLDERS = (list, tuple, dict)
# A list of thousands is data, and looking through it would take the time of a step.
_MOST_HELD = 1_000
_children = itemgetter("_modules")


class Named(NamedTuple):
    """A module; ``name`` is the first one in `Module.named_modules`, ``aliases`` are the others.

    One that a module keeps in a plain list or dictionary, or past PyTorch's own bookkeeping, is named by the
    way to it.
    """

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
        self.modules += _kept_aside(self.modules)
        self.depth = max(each.name.count(".") for each in self.modules) + 2
        # TorchScript's modules stay as they are, and show their parts in another way.
        owns = [vars(m.module) for m in self.modules if not isinstance(m.module, torch.jit.ScriptModule)]
        self._owns = [own for own in owns if isinstance(own.get("_modules"), dict)]
        self._known = [dict(_children(own)) for own in self._owns]
        self._modules = [each.module for each in self.modules]
        self._types = list(map(type, self._modules))
        self._held = [
            (holder, list(_members(holder)))
            for own in self._owns
            for key, holder in own.items()
            if key not in _OF_TORCH and isinstance(holder, _HOLDERS) and any(_modules_in(key, holder))
        ]
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
                all(list(_members(holder)) == known for holder, known in self._held)
                and list(map(_children, self._owns)) == self._known
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


def _kept_aside(known: list[Named]) -> list[Named]:
    """The modules that are no parts of ``known`` ones to PyTorch, and that these keep and may call."""
    found: list[Named] = []
    names = {id(each.module): each.name for each in known}
    waiting = list(known)
    for holder in waiting:
        if isinstance(holder.module, torch.jit.ScriptModule):
            continue
        for key, value in list(vars(holder.module).items()):
            if key in _OF_TORCH:
                continue
            for name, module in _modules_in(key, value):
                if id(module) in names or _holds_one_above(module, holder.name, names):
                    continue
                prefix = f"{holder.name}.{name}" if holder.name else name
                for part in _walk(module):
                    if id(part.module) not in names:
                        names[id(part.module)] = own = f"{prefix}.{part.name}".rstrip(".")
                        found.append(Named(own, part.module, ()))
                        waiting.append(found[-1])
    return found


def _modules_in(name: str, value: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a value is or holds, with the way to each."""
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, _HOLDERS) and len(value) <= _MOST_HELD:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"{name}.{key}", each) for key, each in pairs if isinstance(each, nn.Module))


def _members(holder: Any) -> Iterator[Any]:
    return iter(holder.values() if isinstance(holder, dict) else holder)


def _holds_one_above(module: nn.Module, name: str, names: dict[int, str]) -> bool:
    """Whether a module is one that the holder of this ``name`` lies in, or has such a one as a part."""
    above: Container[str] = {"", *(name[:place] for place, letter in enumerate(name) if letter == "."), name}
    return any(names.get(id(each.module)) in above for each in _walk(module))


def _lies_in(module: nn.Module, above: Any) -> bool:
    while above is not None:
        if above[0] is module:
            return True
        above = above[1]
    return False
