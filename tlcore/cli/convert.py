"""`tlcore convert`: a run rewritten into another backend or place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from ..config.configuration import load_config
from ..errors import ConfigError
from ..layout.jsontext import parse_json
from ..locations import redact_url
from ..reader import Run, open_run
from .losses import losses_of
from .storage_options import add_storage_options, storage_options
from .tables import printable
from .verify import progress

HELP = (
    "Write a complete run into another output_dir with another backend, losslessly: converting there and"
    " back gives the same bytes. The run keeps its id. Incomplete steps are left out, with a note."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="SRC", help="the run's directory; a path or URL")
    parser.add_argument("target", metavar="DST", help="the output_dir to write into; a path or URL")
    parser.add_argument(
        "--backend",
        required=True,
        metavar="NAME|JSON",
        help="as in the configuration: pt, safetensors, or for a URL that needs options"
        ' {"name": "fsspec", "format": "safetensors", "storage_options": {...}}',
    )
    parser.add_argument(
        "--fsync", action="store_true", help="have every file on the disk, to survive a loss of power too"
    )
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and print where the new run lies. Raises TlcoreError as `convert` does."""
    # Imported here, since torch comes with it: help answers at once.
    from ..runs.convert import convert

    backend = args.backend
    if backend.lstrip().startswith("{"):
        try:
            backend = parse_json(backend)
        except ConfigError as error:
            raise ConfigError("--backend", error.problem) from None
    config = load_config(output_dir=args.target, backend=backend, fsync=args.fsync)
    source = open_run(args.path, storage_options(args))
    stored = source.ledger.stored
    with progress() as bar:
        task = bar.add_task("convert", total=stored)
        url = convert(source, config, lambda count: bar.advance(task, count))
        written = int(bar.tasks[0].completed)
    print(printable(redact_url(url)))
    for note in _notes(source):
        # Not with the result, which scripts read.
        print(f"note: {note}", file=sys.stderr)
    if written < stored:
        there = f"the steps that are there have {written}"
        print(f"note: {stored} tensors were stored, and {there}", file=sys.stderr)
    return 0


def _notes(source: Run) -> Iterator[str]:
    """What the new run cannot have, since the source lacks it."""
    if source.incomplete_steps:
        yield f"not committed, so left out: steps {', '.join(map(str, source.incomplete_steps))}"
    losses = losses_of(source)
    if losses:
        yield losses
