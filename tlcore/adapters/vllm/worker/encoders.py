"""Which modules lie within an encoder of images or sounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..module_names import plain_modules

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def within_encoders(model: Any) -> Callable[[str], bool]:
    """Whether a module, by its name, is called by a module that is itself a part of an encoder.

    Of an item's tokens only the outermost parts (the vision model, the projector) have rows in the prompt's
    order: what they do inside is theirs, and some sort tokens by windows (Qwen2.5-VL). What holds the
    language model is no encoder.
    """
    modules = plain_modules(model)
    try:
        language: Any = model.get_language_model()
    except (AttributeError, NotImplementedError):
        language = None

    @functools.cache
    def is_part(name: str) -> bool:
        module = modules.get(name)
        if module is None or isinstance(module, _CONTAINERS) or type(module) is nn.Module:
            return False
        return language is None or all(each is not language for each in module.modules())

    @functools.cache
    def inner(name: str) -> bool:
        parts = name.split(".")
        return any(is_part(".".join(parts[:count])) for count in range(1, len(parts)))

    return inner
