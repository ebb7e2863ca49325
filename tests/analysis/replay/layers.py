"""Modules that replaying tests make by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """Works row by row; ``wrong`` is a sample and row that come out wrong."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.wrong: tuple[int, int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mix(x).tanh()
        if self.wrong is not None:
            y[self.wrong] += 0.25
        return y


class Mixes(nn.Module):
    """Each row is the sum of all up to it; from ``from_row`` on of other values."""

    def __init__(self) -> None:
        super().__init__()
        self.from_row = 99

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, self.from_row :] *= 3
        return x.cumsum(1)


def made() -> nn.Module:
    """A model of two blocks."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", Block())
    model.add_module("second", Block())
    return model.eval()


class Counts(nn.Module):
    """Each call leaves something behind, in buffers and attributes, that the next one sees."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.count: torch.Tensor
        self.mean: torch.Tensor
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size), persistent=False)
        self.seen: list[torch.Tensor] = []
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean = self.mean + x.reshape(-1, x.shape[-1]).mean(0)
        y: torch.Tensor = self.mix(x) + self.count + self.mean.sum() + len(self.seen)
        self.seen.append(y)
        self.cache = y if self.cache is None else self.cache + y
        return self.cache


class Random(nn.Module):
    """Drops some, whatever mode it is in, and has not a number where it began."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, list[torch.Tensor]]:
        y: torch.Tensor = nn.functional.dropout(self.mix(x), 0.3)
        y[..., 0] = float("nan")
        return y, None, [torch.complex(y, x)]


class Narrow(nn.Module):
    """Computes in the dtype of its weights and gives another one, as it is told."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        y: torch.Tensor = self.mix(x.to(self.mix.weight.dtype))
        return y.to(dtype)


class Odd(nn.Module):
    """Gives an empty tensor, and infinities, beside its own; takes keywords alone."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)

    def forward(self, *, x: torch.Tensor) -> dict[str, Any]:
        y = self.mix(x)
        y[:, :2, 0] = float("-inf")
        return {"of": (y, None), "none": x[..., :0]}


class Quantised(nn.Module):
    """Has weights that are no plain tensors; what one row gives depends on all."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(size, size)
        quantize: Any = torch.ao.quantization.quantize_dynamic
        self.quantised = quantize(nn.Sequential(nn.Linear(size, size)), {nn.Linear})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.quantised(self.mix(x))
        return found
