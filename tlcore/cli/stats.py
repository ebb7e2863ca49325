"""`tlcore stats`: the statistics of every tensor of a run, and where NaN and Inf are first seen."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .arguments import local_path, numbers, texts
from .output import progress, write_text
from .storage_options import add_storage_options, storage_options
from .tables import print_table, printable

if TYPE_CHECKING:
    from ..analysis.stats import Survey

HELP = (
    "Statistics of every tensor of a run, in order of execution, and where the first NaN and infinity appear."
    " Exits with 0, or with 1 when a tensor cannot be read."
)
_LONGEST_TABLE = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="a run's directory; a path or URL")
    add("--steps", type=numbers, help="steps to look at, such as 0,1 (default: all)")
    add("--modules", type=texts, default=[], help="regular expressions of module names, comma-separated")
    add(
        "--html",
        metavar="FILE",
        type=local_path,
        help="write a self-contained HTML report there (needs tlcore[report])",
    )
    add("--json", action="store_true", help="print JSON")
    add("--verbose", action="store_true", help=f"list every tensor, not only {_LONGEST_TABLE}")
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the statistics; returns the exit status. Raises TlcoreError when the run cannot be read."""
    # Imported where it is needed, as below, since torch comes with it: help answers at once.
    from ..analysis.stats import stats

    with progress("reading", "tensors") as on_progress:
        survey = stats(
            args.run_path,
            steps=args.steps,
            modules=args.modules,
            storage_options=storage_options(args),
            progress=on_progress,
        )
    if args.html is not None:
        # Imported here, since it needs the extra.
        from ..analysis.report import survey_page

        write_text(survey_page(survey), args.html)
    if args.json:
        write_text(json.dumps(survey.to_json(), indent=1) + "\n", None)
    else:
        _print(survey, args.verbose)
    return 1 if survey.unreadable else 0


def _print(survey: Survey, verbose: bool) -> None:
    from ..analysis.report.stats_text import COLUMNS, noticeable, rows

    for line in survey.verdict():
        print(printable(line))
    noticed = [tensor for tensor in survey.tensors if noticeable(tensor)]
    listed = list(survey.tensors) if verbose or not noticed else noticed
    limit = len(listed) if verbose else _LONGEST_TABLE
    print_table(COLUMNS, rows(listed[:limit]))
    if len(listed) < len(survey.tensors) or len(listed) > limit:
        print(f"... of {len(survey.tensors)} tensors; --verbose lists all")
