"""``tlcore.compare`` of two runs that differ everywhere, against reading them plainly and subtracting."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import tlcore

from .rows import Row, Scale, at_most
from .subprocesses import report
from .timing import Times, interleaved, ratio, timed

_TENSOR_BYTES = 64 << 20
_RUN_BYTES = {"full": 5 << 30, "quick": 1 << 30, "tiny": 3 << 20}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Source(nn.Module):
    """Returns another large tensor at each call, always the same ones for one shift."""

    def __init__(self, count: int, dtype: torch.dtype, shift: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(count // dtype.itemsize // 1024, 1024, generator=generator)
        self.dtype, self.shift = dtype, shift

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        return (self.base * (1 + 0.01 * float(number)) + self.shift).to(self.dtype)


class _Root(nn.Module):
    def __init__(self, source: nn.Module, calls: int) -> None:
        super().__init__()
        self.source, self.calls = source, calls

    def forward(self) -> None:
        for number in range(self.calls):
            self.source(torch.tensor(number))


def table(scale: Scale) -> list[Row]:
    """Time and memory for both backends; the quick form has 1 GiB a run instead of 5."""
    total = _RUN_BYTES[scale.name]
    rows = []
    for backend, dtype in (("safetensors", "float32"), ("pt", "float32"), ("safetensors", "bfloat16")):
        with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
            runs = [_captured(Path(name), backend, dtype, total, shift) for shift in (0.0, 0.01)]
            rows += _rows(runs, backend, dtype, total, scale)
    return rows


def _captured(directory: Path, backend: str, dtype: str, total: int, shift: float) -> str:
    size = min(_TENSOR_BYTES, total // 3)
    root = _Root(_Source(size, _DTYPES[dtype], shift), total // size)
    with tlcore.capture(root, output_dir=str(directory), backend=backend, block_s=600) as capture:
        root()
    return capture.url


def _rows(runs: list[str], backend: str, dtype: str, total: int, scale: Scale) -> list[Row]:
    what = f"{backend}, {dtype}, 2 x {total / (1 << 30):.3g} GiB"
    times = interleaved(
        {"plain": lambda: timed(lambda: _plain(*runs)), "compare": lambda: timed(lambda: _compared(*runs))},
        min(scale.repeats, 3),
    )
    peak = float(report("compare_process", *runs)["peak"])
    return [
        Row(
            f"compare / reading plainly and (a-b).abs().max(), {what}",
            ratio(times, "compare", "plain"),
            at_most(1.5),
            "times",
            f"{_median(times, 'compare'):.2f} s / {_median(times, 'plain'):.2f} s",
        ),
        Row(
            f"memory of the comparing process, {what}", peak / 1e9, at_most(1.0), "GB", "peak, torch included"
        ),
    ]


def _median(times: Times, name: str) -> float:
    return sorted(times[name])[len(times[name]) // 2]


def _compared(a: str, b: str) -> None:
    found = tlcore.compare(a, b)
    assert found.counts["different"] > 0, "the benchmark's runs must differ"


def _plain(a: str, b: str) -> float:
    """The largest difference, as one writes it without tlcore."""
    largest = 0.0
    files = [sorted(Path(run).rglob("*outputs*.pt")) for run in (a, b)]
    for one, other in zip(*files, strict=True):
        largest = max(largest, _distance(torch.load(one), torch.load(other)))
    # A large step lies in several files, and not every run's are cut at the same tensors.
    with ExitStack() as held:
        left, right = (_arrays(run, held) for run in (a, b))
        for name, file in left.items():
            if "outputs" in name:
                largest = max(largest, _distance(file.get_tensor(name), right[name].get_tensor(name)))
    return largest


def _arrays(run: str, held: ExitStack) -> dict[str, Any]:
    """The opened file that has each array of a run."""
    opened: Any = safe_open
    files = [held.enter_context(opened(file, "pt")) for file in sorted(Path(run).rglob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
