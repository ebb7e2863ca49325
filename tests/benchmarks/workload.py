"""What is captured: SmolLM2-135M in bfloat16 under transformers, a prefill or one decode step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from tests.models import smollm2

from .rows import Scale

Kind = Literal["prefill", "decode"]
# Called in a hook with the module's name, the direction, the position of the tensor in it, and the tensor.
OnTensor = Callable[[str, str, int, torch.Tensor], None]


@dataclass(frozen=True)
class Workload:
    """A model and the input of one forward."""

    model: nn.Module
    inputs: Mapping[str, Any]

    def forward(self) -> Any:
        """One step of the model."""
        with torch.inference_mode():
            return self.model(**self.inputs)

    def tensors(self) -> list[torch.Tensor]:
        """A copy of every tensor that capture of all modules sees in one forward, in order."""
        return [tensor for _, tensor in self.placed()]

    def placed(self) -> list[tuple[str, torch.Tensor]]:
        """The same with ``<module>/<direction>_<index>``, where the documented layout has each."""
        found: list[tuple[str, torch.Tensor]] = []

        def keep(name: str, direction: str, index: int, tensor: torch.Tensor) -> None:
            found.append((f"{name}/{direction}_{index}", tensor.clone()))

        with hooked(self.model, keep):
            self.forward()
        return found


def workload(kind: Kind, scale: Scale) -> Workload:
    """One prompt of ``scale.prompt_tokens`` tokens, or one token for each of ``scale.requests`` requests."""
    if scale.tiny:
        return toy(kind, scale)
    return Workload(_smollm2(), {"input_ids": _tokens(kind, scale), "use_cache": False})


def toy(kind: Kind, scale: Scale) -> Workload:
    """The same input for a model of eight small modules."""
    return Workload(_toy(), {"input": _tokens(kind, scale)})


def _tokens(kind: Kind, scale: Scale) -> torch.Tensor:
    shape = (1, scale.prompt_tokens) if kind == "prefill" else (scale.requests, 1)
    return torch.arange(shape[0] * shape[1]).view(shape) % 499 + 1


@lru_cache(maxsize=1)
def _smollm2() -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)
    return model.eval()


def _toy() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Embedding(500, 64), *layers).eval()


@contextmanager
def hooked(model: nn.Module, on_tensor: OnTensor) -> Iterator[None]:
    """Plain hooks on every submodule, which see the tensors that capture of all modules sees."""

    def sees(name: str, direction: str, *values: Any) -> None:
        for index, tensor in enumerate(tensors_in(values)):
            on_tensor(name, direction, index, tensor)

    handles: list[Any] = []
    for name, module in model.named_modules():
        if module is model:
            continue

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            sees(name, "inputs", args, kwargs)

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            sees(name, "outputs", output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))
