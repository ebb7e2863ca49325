"""`tlcore push`: what waits in a spill_dir, delivered to where it belongs."""

from __future__ import annotations

import argparse
from typing import Any

from tlcore_backends.storage.spill.push import SpilledRun, destination, push, spilled_runs

from ..errors import BackendError
from ..locations import redact_url
from .storage_options import add_storage_options, storage_options
from .tables import printable, size
from .verify import progress

HELP = (
    "Deliver what captures left in their spill_dir because the backend could not be reached, and remove it"
    " there. Exit status: 0 everything delivered, 1 something still waits, 2 nothing could be tried."
)
_ELSEWHERE = "  what its capture had written before, or a push delivered, lies at"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="SPILL_DIR", help="a spill_dir, or the directory of one run in it")
    parser.add_argument(
        "--to", metavar="URL", help="the output_dir to deliver to, if it is not the one of the capture"
    )
    parser.add_argument(
        "--force", action="store_true", help="also runs whose process seems to be alive on this machine"
    )
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Deliver run after run. Raises BackendError when there is no such directory."""
    options = storage_options(args)
    runs = spilled_runs(args.path)
    waits = False
    for spilled in runs:
        if spilled.owner_alive and not args.force:
            print(
                printable(f"{spilled.path}: its process is alive and delivers by itself; --force overrides")
            )
            waits = True
            continue
        try:
            _push(spilled, options, args.to)
        except BackendError as error:
            print(printable(f"{spilled.path}: not delivered: {error}"))
            waits = True
        else:
            what = f"{len(spilled.files)} files, {size(spilled.bytes)}"
            print(printable(f"{spilled.path}: delivered {what} to {redact_url(args.to or spilled.url)}"))
            if args.to and destination(spilled, args.to) != spilled.url:
                print(printable(f"{_ELSEWHERE} {redact_url(spilled.url)}; copy it there, too"))
    if not runs:
        print("nothing waits")
    return 1 if waits else 0


def _push(spilled: SpilledRun, options: Any, to: str | None) -> None:
    with progress() as bar:
        task = bar.add_task("push", total=len(spilled.files))
        push(spilled, options, to, lambda name: bar.advance(task))
