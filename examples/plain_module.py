"""Capture every submodule of a plain PyTorch model for two steps, then say what became of each tensor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import tlcore


class Block(nn.Module):
    """A small feed-forward block with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the block's contribution to ``x`` (batch, width)."""
        out: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Stack(nn.Module):
    """Blocks one after another."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass ``x`` (batch, width) through all of them."""
        for layer in self.layers:
            x = layer(x)
        return x


def main(argv: Sequence[str] | None = None) -> str:
    """Capture two forward passes; returns the run's directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="/tmp/tlcore_example")
    parser.add_argument("--match", action="append", help="regex on module names; all modules by default")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Stack(16, 2)
    with tlcore.capture(
        model, output_dir=args.output_dir, module_call_match=args.match, log_step_ids=[]
    ) as capture:
        for _ in range(2):
            model(torch.randn(3, 16))

    counts = capture.ledger
    print(f"run: {capture.url}")
    print(f"captured {counts.captured} = stored {counts.stored} + skipped {counts.skipped}", end=" ")
    print(f"+ dropped {counts.dropped} + failed {counts.failed}")
    return capture.url


if __name__ == "__main__":
    main()
