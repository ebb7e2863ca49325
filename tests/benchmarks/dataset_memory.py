"""What a process holds while it reads 10 GB shuffled, from a disk and from a store that serves ranges."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

import tlcore

from .dataset import NAME, STEP_BYTES, captured
from .memory_process import forget_peak, peak_rss
from .rows import Row, Scale, at_most
from .subprocesses import print_report, report

_BATCH = 4096


# The local disk under a name by which it is read as a remote store is: ranges, by several threads.
_Ranges = type("Ranges", (LocalFileSystem,), {"protocol": "ranges"})


def table(scale: Scale) -> list[Row]:
    """The most memory of an epoch, all that opening the run takes included."""
    steps = {"full": 640, "quick": 64, "tiny": 1}[scale.name]
    found = []
    with tempfile.TemporaryDirectory(prefix="tlcore-bench-") as name:
        url = captured(str(Path(name) / "runs"), "safetensors", steps)
        for place, where in ((url, "a disk"), (f"ranges://{url}", "ranges of a store")):
            measured = report("dataset_memory", place, timeout_s=3600)
            total = steps * STEP_BYTES
            detail = f"more than before the run was opened; {total / 1e9:.1f} GB, {measured['rows']} rows"
            what = f"memory of an epoch, shuffled, from {where}, MB"
            found.append(Row(what, measured["bytes"] / 1e6, at_most(512), "", detail))
    return found


def _epoch(url: str) -> dict[str, int]:
    fsspec.register_implementation("ranges", _Ranges, clobber=True)
    forget_peak()
    before = peak_rss()
    data = tlcore.open_run(url).dataset(NAME)
    rows = sum(len(batch["positions"]) for batch in data.loader(_BATCH))
    if rows != len(data):
        raise RuntimeError(f"{rows} rows of {len(data)}")
    return {"bytes": peak_rss() - before, "rows": rows}


if __name__ == "__main__":
    import sys

    print_report(_epoch(*sys.argv[1:]))
