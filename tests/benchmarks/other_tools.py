"""One other way of capturing, in a process of its own, since some of them change torch for good.

``python -m tests.benchmarks.other_tools NAME SCALE`` prints times and the captured set as one JSON line.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .capturing import capturing, size_of
from .rows import SCALES, Scale
from .subprocesses import print_report
from .timing import interleaved, timed
from .workload import Workload, tensors_in, workload

# Seconds of one captured forward, how many tensors it got, and their bytes.
Captured = tuple[float, int, int]


def transformers_debugger(work: Workload, directory: Path) -> Captured:
    """The model debugger of transformers, which writes one safetensors file a tensor."""
    from transformers.model_debugging_utils import model_addition_debugger_context

    folder = directory / "debugger"
    begin = time.perf_counter()
    with model_addition_debugger_context(work.model, str(folder), do_prune_layers=False, use_repr=False):
        work.forward()
    seconds = time.perf_counter() - begin
    sizes = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    shutil.rmtree(folder)
    return seconds, len(sizes), sum(sizes)


def torchlens(work: Workload, directory: Path) -> Captured:
    """torchlens, which keeps the output of every operation in memory."""
    library: Any = importlib.import_module("torchlens")
    begin = time.perf_counter()
    with torch.inference_mode():
        trace = library.trace(work.model, input_kwargs=dict(work.inputs))
    seconds = time.perf_counter() - begin
    return seconds, *_count(op.out for layer in trace.layers for op in layer.ops)


def nnsight(work: Workload, directory: Path) -> Captured:
    """nnsight's cache of every module's inputs and output: references to the model's own CPU tensors."""
    library: Any = importlib.import_module("nnsight")
    wrapped = library.NNsight(work.model)
    begin = time.perf_counter()
    with torch.inference_mode(), wrapped.trace(**work.inputs) as tracer:
        cache = tracer.cache(include_inputs=True).save()
    seconds = time.perf_counter() - begin
    views = [cache[name] for name in cache.keys()]  # noqa: SIM118 - it is no mapping
    return seconds, *_count((view.output, view.inputs) for view in views)


TOOLS: dict[str, Callable[[Workload, Path], Captured]] = {
    "transformers' model debugger": transformers_debugger,
    "torchlens": torchlens,
    "nnsight": nnsight,
}


def _count(values: Iterable[Any]) -> tuple[int, int]:
    tensors = list(tensors_in(list(values)))
    return len(tensors), size_of(tensors)


def measure(tool: str, scale: Scale) -> dict[str, Any]:
    """The plain forward and tlcore's in turn, then the other tool's."""
    work = workload("prefill", scale)
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        with capturing(work, directory, backend="safetensors") as capture:
            times = interleaved(
                {"plain": lambda: timed(work.forward), "tlcore": capture.forward_s}, scale.repeats
            )
        TOOLS[tool](work, directory)
        runs = [TOOLS[tool](work, directory) for _ in range(max(5, scale.repeats // 2))]
    _, count, size = runs[0]
    return {"times": {**times, "tool": [run[0] for run in runs]}, "tensors": count, "bytes": size}


if __name__ == "__main__":
    print_report(measure(sys.argv[1], SCALES[sys.argv[2]]))
