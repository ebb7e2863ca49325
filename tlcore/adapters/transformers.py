"""Taps for transformers' attention: queries and keys behind RoPE, values, and attention probabilities."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..engine.hooks.tap_point import tap
from ..errors import CaptureError

_EAGER = "eager_attention_forward"


@contextmanager
def tap_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, each attention module of ``model`` taps ``q``, ``k``, ``v`` and ``probs``.

    They have the shapes that transformers' attention interface hands on: (batch, heads, tokens, head size),
    and (batch, heads, queries, keys) for the probabilities. Raises CaptureError for a model whose attention
    is not transformers' ``eager`` one: others compute no probabilities.
    """
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if chosen != "eager":
        raise CaptureError(
            f"attention probabilities exist only in transformers' eager attention, and this model's is"
            f' {chosen!r}; load it with attn_implementation="eager"'
        )
    own = set(map(id, model.modules()))
    files = {sys.modules[type(each).__module__] for each in model.modules()}
    found = {each: vars(each)[_EAGER] for each in files if callable(vars(each).get(_EAGER))}
    if not found:
        raise CaptureError(f"{type(model).__name__} does not use transformers' attention interface")
    for file, attend in found.items():
        vars(file)[_EAGER] = _tapped(attend, own)
    try:
        yield
    finally:
        for file, attend in found.items():
            vars(file)[_EAGER] = attend


def _tapped(attend: Callable[..., Any], own: set[int]) -> Callable[..., Any]:
    def eager_attention_forward(
        module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if id(module) not in own:
            return attend(module, query, key, value, *args, **kwargs)
        query, key, value = tap("q", query), tap("k", key), tap("v", value)
        output = attend(module, query, key, value, *args, **kwargs)
        tap("probs", output[1])
        return output

    return eager_attention_forward
