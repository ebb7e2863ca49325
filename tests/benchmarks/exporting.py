"""`tlcore export --format requests` of local runs, against copying the runs' files."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tlcore
from tests.ranked import Rows, requests_run
from tlcore.runs.export.export import export

from .dataset import NAME, STEP_BYTES, captured
from .rows import Row, Scale, at_most
from .timing import interleaved, ratio, timed

_WIDTH, _BATCH = 1024, 32


def table(scale: Scale) -> list[Row]:
    """Long requests of one layer; and all layers of short ones, as a server decodes them together."""
    steps = {"full": 32, "quick": 16, "tiny": 1}[scale.name]
    layers, tokens = {"full": (24, 64), "quick": (12, 32), "tiny": (2, 2)}[scale.name]
    names = [f"layer_{number}/outputs" for number in range(layers)]
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        directory = Path(name)
        url = captured(str(directory / "one"), "safetensors", steps)
        found += _rows("one layer", url, [NAME], steps * STEP_BYTES, directory, scale)
        for backend in ("safetensors", "pt"):
            url = _served(directory / backend, backend, layers, tokens)
            size = layers * 2 * tokens * _BATCH * _WIDTH * 2
            found += _rows(f"{layers} layers, {backend}", url, names, size, directory, scale)
    return found


def _rows(what: str, url: str, names: list[str], size: int, directory: Path, scale: Scale) -> list[Row]:
    run, places = tlcore.open_run(url), directory / "places"
    processor: dict[str, list[float]] = {"export": [], "copy": []}

    def spent(name: str, make: Callable[[Path], object]) -> float:
        target = places / f"{name}-{len(processor[name])}"
        begin = time.process_time()
        seconds = timed(lambda: make(target))
        processor[name].append(time.process_time() - begin)
        return seconds

    places.mkdir()
    times = interleaved(
        {
            "export": lambda: spent("export", lambda to: export(run, to, "requests", names, loss="all")),
            "copy": lambda: spent("copy", lambda to: shutil.copytree(url, to)),
        },
        max(2, scale.repeats // 2),
    )
    shutil.rmtree(places)
    # For five seconds ext4 steps over each file that was removed, whenever it makes one.
    time.sleep(0 if scale.name == "tiny" else 6)
    named = f"export --format requests of {what} / copying the run's files"
    shown = " / ".join(f"{min(times[each]) * 1e3:.0f}" for each in ("export", "copy"))
    # Without the round that warms up.
    processor = {each: processor[each][-len(times[each]) :] for each in processor}
    own = " / ".join(f"{min(processor[each]) * 1e3:.0f}" for each in ("export", "copy"))
    detail = f"{shown} ms; {size / 1e6:.0f} MB"
    return [
        Row(named, ratio(times, "export", "copy"), at_most(1.5), "times", detail),
        Row(f"{named}, processor time", ratio(processor, "export", "copy"), None, "times", f"{own} ms"),
    ]


def _served(directory: Path, backend: str, layers: int, tokens: int) -> str:
    """A run of so many requests together, as many tokens each, and as many generated."""
    ids = [f"r{number}-{number:08x}" for number in range(_BATCH)]
    steps: list[Rows] = [[(request, tokens, 0) for request in ids]]
    steps += [[(request, 1, tokens + at) for request in ids] for at in range(tokens)]
    random = torch.Generator().manual_seed(0)
    values = torch.randn(_BATCH * tokens + layers, _WIDTH, generator=random).bfloat16()

    def tensors(step: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        count = sum(row["rows"] for row in rows)
        return {f"layer_{at}": values[at : at + count] + step for at in range(layers)}

    def extra(step: int) -> dict[str, Any]:
        told = [
            {"request_id": request, "prompt": tokens, "first_position": first, "ids": list(range(count))}
            for request, count, first in steps[step]
        ]
        return {"tokens": told}

    return requests_run(directory, steps, tensors, backend=backend, extra=extra).url
