"""A small model captured over a faulty place, and what is looked at afterwards."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import tlcore
from tests.faults.proxy import Proxy
from tests.servers import Server
from tlcore.ledger import Counts

# Time that a busy machine may take for anything, beside the waiting that is allowed.
SLACK_S = 6.0
STEP_TENSORS = 6


def model() -> nn.Sequential:
    """Three modules, so six tensors a step, of 16 KiB each."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def inputs(step: int) -> torch.Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(step))


@dataclass
class Outcome:
    """What a capture did: where the run lies, its ledger, each step's seconds, what was logged."""

    url: str = ""
    ledger: Counts = field(default_factory=Counts)
    step_s: list[float] = field(default_factory=list)
    close_s: float = 0.0
    same_outputs: bool = True
    warnings: list[str] = field(default_factory=list)


def capture(
    keys: Mapping[str, Any],
    steps: int = 4,
    before_step: Callable[[tlcore.capture, int], None] = lambda captured, step: None,
    before_close: Callable[[tlcore.capture], None] = lambda captured: None,
) -> Outcome:
    """Capture every step of the small model; ``before_step`` is where faults begin and end."""
    module = model()
    expected = [module(inputs(step)) for step in range(steps)]
    outcome = Outcome()
    settings: dict[str, Any] = {"log_step_ids": [], **keys}
    with collected_warnings(outcome.warnings):
        captured = tlcore.capture(module, **{"module_call_match": ".", **settings})
        captured.__enter__()
        try:
            for step in range(steps):
                before_step(captured, step)
                x, begin = inputs(step), time.monotonic()
                output = module(x)
                outcome.step_s.append(time.monotonic() - begin)
                outcome.same_outputs &= torch.equal(output, expected[step])
            before_close(captured)
        finally:
            begin = time.monotonic()
            captured.__exit__(None, None, None)
            outcome.close_s = time.monotonic() - begin
    outcome.url, outcome.ledger = captured.url, captured.ledger
    return outcome


@contextmanager
def collected_warnings(texts: list[str]) -> Iterator[None]:
    """Every warning and error that anything logs meanwhile, tlcore or a library under it.

    But the advice against an object for each tensor: it is no fault, and right for these small runs.
    """

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "one object for each tensor" not in text:
                texts.append(text)

    handler = Collector(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def options(weed: Server, port: int) -> dict[str, Any]:
    """SeaweedFS's storage_options, through a proxy at ``port``."""
    return {**weed.options, "endpoint_url": f"http://127.0.0.1:{port}"}


# How a format is asked for: segments of one step each, since the faults here are told step by step.
OPTIONS: dict[str, dict[str, Any]] = {
    "pt": {},
    "safetensors": {"commit_s": 0},
    "shards": {"layout": 1},
}


def local(format: str) -> dict[str, Any]:
    """A format's backend for the local disk."""
    return {"name": "pt" if format == "pt" else "safetensors", **OPTIONS[format]}


def backend(weed: Server, proxy: Proxy, **changes: Any) -> dict[str, Any]:
    """A backend that reaches SeaweedFS through the proxy."""
    format = changes.pop("format", "pt")
    changes = {"format": "pt" if format == "pt" else "safetensors", **OPTIONS[format], **changes}
    return {
        "name": "fsspec",
        "url": f"{weed.url}/faults",
        "storage_options": options(weed, proxy.server_port),
        "deadline_s": 10.0,
        "attempts": 2,
        **changes,
    }


def files_below(directory: str | Path) -> dict[str, bytes]:
    """Every finished file below a directory by its relative name."""
    root = Path(directory)
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def remote_files(run: tlcore.Run) -> dict[str, bytes]:
    """Every file of a run, wherever it lies."""
    return {name: run.stored.files.read(name) for name in run.stored.files.sizes}


def assert_whole(outcome: Outcome, run: tlcore.Run, steps: int) -> None:
    """Nothing was lost: every step is there, sound, and equal to what a local capture stores."""
    assert outcome.ledger.stored == outcome.ledger.captured == steps * STEP_TENSORS
    assert run.state == "complete"
    assert run.steps == list(range(steps))
    assert run.incomplete_steps == []
    assert run.verify() == steps * STEP_TENSORS
    assert run.ledger.to_json() == outcome.ledger.to_json()


class Usage(NamedTuple):
    """What a process holds: resident memory in bytes, open file handles, threads."""

    memory: int
    handles: int
    threads: int


def usage_of(pid: int | str) -> Usage:
    """What the kernel says about a process."""
    place = Path("/proc") / str(pid)
    pages = int((place / "statm").read_text().split()[1])
    handles, threads = (len(list((place / name).iterdir())) for name in ("fd", "task"))
    return Usage(pages * os.sysconf("SC_PAGE_SIZE"), handles, threads)
