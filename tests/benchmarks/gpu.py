"""``python -m tests.benchmarks.gpu [--json FILE]``: what capture costs on a device, as one table.

Random Llamas of 135M and 1B parameters, prefill and decode, eager and as replayed CUDA graphs. What is
captured is stored durably, and the time until then counts. It needs torch, transformers and a device; it
ends by itself, and says what it left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tlcore

from .gpu_work import Work, llama, recorded, works
from .rows import Limit, at_most
from .workload import hooked

_BATCHES = (1, 8, 32)
# At batch 32, where nothing hides behind an idle device.
_TARGETS = {"all modules": at_most(1.05), "one layer": at_most(1.01), "statistics only": at_most(1.03)}
_ONE_LAYER = r"^model\.layers\.1$"


@dataclass(frozen=True)
class Run:
    """Some steps in a row: seconds until all is stored, the host's share, and the most device memory."""

    total_s: float
    host_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Line:
    """A line of the table: how a way of capturing changes the throughput of a step."""

    what: str
    way: str
    slowdown: float
    host_ms: float
    added_mb: float
    tokens_per_s: float
    target: Limit | None

    def text(self) -> str:
        """As it is printed."""
        met = "" if self.target is None else ("met" if self.target.holds(self.slowdown) else "MISSED")
        limit = "" if self.target is None else f"{self.target.kind} {self.target.value:g}"
        figures = (
            f"{self.slowdown:>8.3f} {self.host_ms:>10.2f} {self.added_mb:>9.0f} {self.tokens_per_s:>10.0f}"
        )
        return f"  {self.what:<38} {self.way:<22} {figures}  {limit:<13} {met}"


Way = Callable[[Path], Any]


def ways(work: Work, steps: int) -> dict[str, Way]:
    """Contexts by name: what is done to the model while its steps run."""
    every = list(range(steps))
    common: dict[str, Any] = {"backend": "safetensors", "log_step_ids": every}

    def captured(**keys: Any) -> Way:
        return lambda directory: _captured(work, str(directory), {**common, **keys})

    return {
        "nothing": lambda directory: nullcontext(),
        "all modules": captured(),
        "one layer": captured(module_call_match=[_ONE_LAYER]),
        "statistics only": captured(capture="stats"),
        "steps not selected": captured(log_step_ids=[10**9]),
        "hooks with .cpu()": lambda directory: hooked(work.model, lambda *each: each[3].cpu()),
        "hooks with torch.save": lambda directory: hooked(work.model, _Saving(directory)),
    }


@contextmanager
def _captured(work: Work, directory: str, keys: dict[str, Any]) -> Iterator[None]:
    with tlcore.capture(work.model, output_dir=directory, **keys) as capture:
        yield
        work.settle()
    counts = capture.ledger
    if counts.stored + counts.skipped != counts.captured:
        raise RuntimeError(f"not everything was stored: {counts.to_json()}")


class _Saving:
    """What people write by hand: each tensor a file, at once."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._count = 0

    def __call__(self, name: str, direction: str, index: int, tensor: torch.Tensor) -> None:
        torch.save(tensor.detach().cpu(), self._directory / f"{self._count}-{name}-{direction}-{index}.pt")
        self._count += 1


def measured(work: Work, way: Way, steps: int, directory: Path) -> Run:
    """Some steps in a row, done in one way, until what they left is on the disk."""
    target = directory / f"run-{time.time_ns()}"
    on_device = work.device.type == "cuda"
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    work.settle()
    begin = time.perf_counter()
    with way(target), torch.inference_mode():
        in_host = time.perf_counter()
        for _ in range(steps):
            work.step()
        host = time.perf_counter() - in_host
        work.settle()
    os.sync()
    total = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if on_device else 0
    shutil.rmtree(target, ignore_errors=True)
    return Run(total, host, peak)


def compared(work: Work, chosen: Sequence[str], steps: int, rounds: int, directory: Path) -> list[Line]:
    """Each way beside the bare steps, in turn, the first round forgotten."""
    kinds = ways(work, steps)
    found: dict[str, list[Run]] = {name: [] for name in ("nothing", *chosen)}
    for number in range(rounds + 1):
        for name, runs in found.items():
            run = measured(work, kinds[name], steps, directory)
            if number:
                runs.append(run)
    bare = found.pop("nothing")
    lines = []
    for name, runs in found.items():
        total = median(run.total_s for run in runs)
        pairs = list(zip(runs, bare, strict=True))
        lines.append(
            Line(
                work.what,
                name,
                median(one.total_s / other.total_s for one, other in pairs),
                median(one.host_s - other.host_s for one, other in zip(runs, bare, strict=True))
                / steps
                * 1e3,
                (max(run.peak_bytes for run in runs) - max(run.peak_bytes for run in bare)) / 1e6,
                work.tokens * steps / total,
                _TARGETS.get(name) if work.what.endswith("batch 32") else None,
            )
        )
    return lines


def table(
    shapes: Sequence[str],
    batches: tuple[int, ...],
    device: torch.device,
    steps: int,
    rounds: int,
    limit_s: float,
) -> tuple[list[Line], list[str]]:
    """The lines, each said as soon as it is there, and what the time did not suffice for."""
    end = time.monotonic() + limit_s
    lines: list[Line] = []
    left_out: list[str] = []
    eager = [name for name in ways(_nothing(device), steps) if name != "nothing"]

    def add(work: Work, chosen: Sequence[str], directory: Path) -> None:
        # A prefill's tensors are hundreds of megabytes.
        count = steps if "decode" in work.what else max(1, steps // 16)
        if time.monotonic() > end:
            left_out.append(work.what)
            return
        for line in compared(work, chosen, count, rounds, directory):
            lines.append(line)
            say(line.text())

    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        for shape in shapes:
            model = llama(shape, device)
            for work in works(shape, model, batches, device):
                add(work, eager, Path(name))
                if device.type != "cuda" or "decode" not in work.what:
                    continue
                try:
                    with recorded(work) as replayed:
                        add(replayed, ["steps not selected"], Path(name))
                except RuntimeError as error:
                    left_out.append(f"{work.what}, replayed graph: {error}")
            del model
    return lines, left_out


def _nothing(device: torch.device) -> Work:
    return Work("", torch.nn.Identity(), lambda: None, 0, device)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda by default; cpu shows that the program runs")
    parser.add_argument("--shapes", nargs="+", default=["135M", "1B"], help="toy, 135M, 1B")
    parser.add_argument("--steps", type=int, default=48, help="decode steps of each run; prefills are fewer")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many rounds")
    parser.add_argument(
        "--limit-s", type=float, default=200, help="no measurement begins after so many seconds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines as JSON")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("this needs a CUDA device, and torch sees none; --device cpu shows that it runs\n")
        return 2
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"{card}, torch {torch.__version__}; each way against the bare steps of the same round")
    say(f"  {'step':<38} {'captured':<22} {'slowdown':>8} {'host ms':>10} {'MB added':>9} {'tokens/s':>10}")
    lines, left_out = table(args.shapes, _BATCHES, device, args.steps, args.rounds, args.limit_s)
    for each in left_out:
        say(f"  left out: {each}")
    if args.json:
        document = {"card": card, "torch": str(torch.__version__), "lines": [asdict(line) for line in lines]}
        args.json.write_text(json.dumps({**document, "left_out": left_out}, indent=1) + "\n")
    return int(any(line.target and not line.target.holds(line.slowdown) for line in lines))


if __name__ == "__main__":
    # That a run has no step is what is measured here.
    logging.getLogger("tlcore").setLevel(logging.ERROR)
    sys.exit(main())
