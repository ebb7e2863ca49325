"""The names of a vLLM model's modules, which adapters (LoRA) must not change."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.hooks.module_tree import ModuleTree

_INNER = "base_layer"
_ELSEWHERE = "PPMissingLayer"


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's submodules by name; a layer with adapters goes by its own name, and has no inner one.

    What stands in a pipeline's stage for a layer of another stage is none: it hands on what it is given.
    """
    found: dict[str, nn.Module] = {}
    for name, module, *_ in ModuleTree(model).modules:
        if type(module).__name__ == _ELSEWHERE:
            continue
        parts = name.split(".")
        if _INNER not in parts:
            found[name] = module
        elif parts[-1] != _INNER:
            found.setdefault(".".join(part for part in parts if part != _INNER), module)
    found.pop("", None)
    return found


def without_adapters(module: nn.Module) -> Any:
    """The layer itself, where adapters have been wrapped around it."""
    while isinstance(inner := getattr(module, _INNER, None), nn.Module):
        module = inner
    return module
