"""`tlcore verify`: whether everything that a run stored is there, whole and unchanged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import ReadError, VerifyError
from ..reader import Run, open_run
from ..record import Json
from .losses import losses_of
from .storage_options import add_storage_options, storage_options
from .tables import printable

HELP = (
    "Read every committed tensor of a run and check its hash, its structures and its shards."
    " It answers for what is stored; what was dropped or failed at capture is told, but changes no status."
    " Exit status: 0 all that is stored is sound, 1 something damaged or missing, 2 the run cannot be read."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="URL", help="a run's directory; a path or URL")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the run. Raises ReadError when it cannot be opened."""
    opened = open_run(args.path, storage_options(args))
    bad: list[str] = []
    with progress() as bar:
        task = bar.add_task("verify", total=None)
        try:
            sound = opened.verify(lambda: bar.advance(task))
        except VerifyError as error:
            sound, bad = 0, error.bad
    incomplete = opened.incomplete_steps
    if args.json:
        print(json.dumps(_result(opened, bad, incomplete) | ({} if bad else {"sound": sound}), indent=1))
        return 1 if bad else 0
    for line in bad:
        print(printable(line))
    if incomplete:
        print(f"not committed, so not wholly checked: steps {', '.join(map(str, incomplete))}")
    if opened.unchecked:
        print(_unchecked(opened.unchecked))
    losses = losses_of(opened)
    found = f"{len(bad)} damaged" if bad else f"{sound} tensors sound"
    if opened.is_foreign:
        found += " (they can be read; the tool stored no hashes)"
    state = opened.state if opened.injection is None else f"{opened.state}, injected"
    print(f"run {opened.id}  {state}  {found}" + (f"  {losses}" if losses else ""))
    return 1 if bad else 0


def _result(opened: Run, bad: list[str], incomplete: list[int]) -> Json:
    try:
        ledger = opened.ledger.to_json()
    except ReadError:
        # Why it cannot be read is one of the problems.
        ledger = None
    about = {"run_id": opened.id, "state": opened.state, "ledger": ledger}
    return about | {"bad": bad, "incomplete_steps": incomplete, "unchecked": opened.unchecked}


def _unchecked(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
    return (
        f"of an earlier version, without checksums: {len(names)} documents ({shown});"
        " what they say beside the tensors is not checked"
    )


def progress() -> Progress:
    """A progress bar on standard error, shown on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
