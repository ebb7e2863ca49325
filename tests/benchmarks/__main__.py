"""``python -m tests.benchmarks [names...] [--json FILE] [--quick] [--steps N]``: measurements as a table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tlcore.hotpath.native import in_use

from .machine import Others
from .rows import SCALES, Row, Scale

TABLES = (
    "prefill",
    "breakdown",
    "hooks",
    "operators",
    "foreign",
    "unselected",
    "decode",
    "vllm_prefill",
    "vllm_decode",
    "vllm_layer",
    "compiled_cost",
    "baselines",
    "memory",
    "object_storage",
    "reading",
    "compare_speed",
    "report",
    "growth",
    "long",
    "long_growth",
    "long_decode",
    "long_uploads",
    "dataset",
    "dataset_memory",
    "exporting",
    "fetching",
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table; 1 when a target is missed."""
    known = [name for name in TABLES if find_spec(f"{__package__}.{name}")]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--steps", type=int, metavar="N", help="the steps of the run in `long_growth`")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    scale = SCALES["quick" if args.quick else "full"]
    if args.steps is not None:
        scale = dataclasses.replace(scale, long_steps=args.steps)
    sys.stdout.write(f"hot path: {in_use()}\n")
    rows: dict[str, list[Row]] = {}
    busy: dict[str, float | None] = {}
    for name in args.names or known:
        others, begin = Others(), time.monotonic()
        rows[name] = run(name, scale)
        busy[name] = others.cores()
        print_rows(name, rows[name], time.monotonic() - begin, busy[name])
        if args.json:
            args.json.write_text(json.dumps(document(rows, busy, scale), indent=1) + "\n")
    missed = [row for group in rows.values() for row in group if row.met is False]
    sys.stdout.write(f"{len(missed)} of {sum(map(len, rows.values()))} rows miss their target\n")
    return 1 if missed else 0


def run(name: str, scale: Scale) -> list[Row]:
    """The rows of one table."""
    module = importlib.import_module(f"{__package__}.{name}")
    rows: list[Row] = module.table(scale)
    return rows


def print_rows(name: str, rows: list[Row], seconds: float, others: float | None) -> None:
    """One table as text, as soon as it is there; ``others`` is how many cores other processes took."""
    beside = "" if others is None else f", {others:.1f} cores taken by other processes"
    sys.stdout.write(f"{name} ({seconds:.0f} s{beside})\n")
    for row in rows:
        target = "" if row.target is None else f"{row.target.kind} {row.target.value:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        measured = f"{row.measured:.3f}" if row.measured < 10 else f"{row.measured:.1f}"
        sys.stdout.write(
            f"  {row.what:<76} {measured:>8} {row.unit:<8} {target:<14} {verdict:<7} {row.detail}\n"
        )
    sys.stdout.flush()


def document(rows: dict[str, list[Row]], others: dict[str, float | None], scale: Scale) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "scale": scale.name,
        "repeats": scale.repeats,
        "hot_path": in_use(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "cores_taken_by_other_processes": others,
        "tables": {name: [row.to_json() for row in group] for name, group in rows.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
