"""What a run tells of a module when the capture began, against what the module is now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...reader import Run
from ...statistics.weights import SAMPLED, in_training, sampled
from ..makings import packs_weights, part_of

_SHOWN = 3


def since_capture(run: Run, name: str, module: Any, rank: int = 0) -> Iterator[str]:
    """Notes on a ``module`` that is called ``name`` in the run: other weights, buffers and modes than then.

    Where nothing was told of them, that is said.
    """
    if isinstance(module, nn.Module):
        # Of other ranks, which may have other parts of the weights, nothing is told, and vLLM packs its own.
        known = rank == 0 and packs_weights(run) == type(module).__module__.startswith("vllm.")
        yield from _weights(part_of(run, "weights").get("tensors") if known else None, name, module)
        yield from _modes(part_of(run, "training"), name, module)


def _weights(told: Any, name: str, module: nn.Module) -> Iterator[str]:
    named = chain(module.named_parameters(), module.named_buffers())
    tensors: dict[str, torch.Tensor] = {key: each for key, each in named if not is_lazy(each)}
    then = {key: _text(told, _inner(name, key)) for key in tensors}
    now = sampled({key: each for key, each in tensors.items() if then[key]})
    if tensors and not now:
        yield "whether its weights are those of then is in no run"
    if not now:
        return
    others = [key for key in now if now[key] != then[key] and _dtype(now[key]) == _dtype(then[key])]
    parameters = dict(module.named_parameters())
    for what, is_parameter in (("parameters", True), ("buffers", False)):
        if found := [key for key in others if (key in parameters) is is_parameter]:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            yield f"its {what} {', '.join(found[:_SHOWN])}{more} are others than when the capture began"
    same = sum(now[key] == then[key] for key in now)
    if same == len(tensors):
        yield f"its parameters and buffers are those of then, as far as {SAMPLED} values of each tell"
    elif not others:
        yield f"{same} of its {len(tensors)} parameters and buffers are known to be those of then"


def _text(told: Any, key: str) -> str:
    found = told.get(key) if isinstance(told, Mapping) else None
    return found if isinstance(found, str) else ""


def _dtype(told: str) -> str:
    return told.partition(" ")[0]


def _modes(told: Mapping[str, Any], name: str, module: nn.Module) -> Iterator[str]:
    if not told:
        if module.training:
            yield "it is in training mode, and in which it was is in no run"
        return
    for training in (True, False):
        found = [
            key
            for key, each in module.named_modules()
            if each.training is training and in_training(told, _inner(name, key)) is (not training)
        ]
        if found:
            now, then = ("training", "evaluation") if training else ("evaluation", "training")
            what = "it is" if not found[0] else f"in it {', '.join(found[:_SHOWN])} are"
            yield f"{what} in {now} mode now, in {then} mode when the capture began"


def _inner(name: str, key: str) -> str:
    return f"{name}.{key}" if name and key else name or key
