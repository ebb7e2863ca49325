"""The HTML report on a comparison of 30,000 tensors: its time beside comparing, and its memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlcore

from .rows import Row, Scale, at_most
from .subprocesses import report

# Each layer has an input and an output in each step.
_LAYERS = {"full": 1500, "quick": 1500, "tiny": 40}
_STEPS, _TOKENS, _SIZE = 10, 32, 8


class Many(nn.Module):
    """Layers that hand on what they get; behind the middle one ``shift`` is added to a token."""

    def __init__(self, layers: int, shift: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A step of the model."""
        for at, layer in enumerate(self.layers):
            x = layer(x * 0.999 + at % 3)
            if at == len(self.layers) // 2:
                x[3] += self.shift
        return x


def _captured(directory: Path, layers: int, shift: float) -> str:
    model = Many(layers, shift)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"backend": "safetensors", "log_step_ids": [], "block_s": 600}
    with tlcore.capture(model, output_dir=str(directory), **options) as capture:
        for _ in range(_STEPS):
            model(torch.randn(_TOKENS, _SIZE, generator=generator))
    return capture.url


def table(scale: Scale) -> list[Row]:
    """Time beside the comparison's, and memory: of the whole process, and what the report adds."""
    layers = _LAYERS[scale.name]
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        runs = [_captured(Path(name), layers, shift) for shift in (0.0, 1e-3)]
        file = Path(name) / "report.html"
        found = [report("report_process", *runs, str(file)) for _ in range(3 if scale.name == "full" else 1)]
        size = file.stat().st_size
    best = min(found, key=lambda each: float(each["page"]))
    what = f"{best['tensors']} tensors"
    times = f"{best['page']:.2f} s / {best['compare']:.2f} s; {size / 1e6:.1f} MB"
    before, compared, peak = (best[each] / 1e6 for each in ("before", "compared", "peak"))
    return [
        Row(f"HTML report / comparing, {what}", best["page"] / best["compare"], None, "times", times),
        Row(
            f"HTML report, {what}",
            best["page"],
            at_most(20),
            "s",
            "of the processor; matplotlib is imported in it",
        ),
        Row(
            f"memory that the HTML report adds, {what}",
            peak - compared,
            at_most(300),
            "MB",
            f"peaks: {before:.0f} MB with torch imported, {compared:.0f} compared, {peak:.0f} at the end",
        ),
    ]
