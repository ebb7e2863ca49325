"""Modules that replaying tests make by name."""

from __future__ import annotations

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
