"""`tlcore compare`: where two runs part, as a table, Markdown or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..comparison import Comparison, compare
from ..comparison.html import page
from ..comparison.text import COLUMNS, markdown, rows, shown, verdict
from ..errors import ConfigError, TlcoreError
from .tables import print_table, printable

HELP = (
    "Compare two runs tensor by tensor in order of execution. Exits with 0 when they agree, with 1 when"
    " they differ or something is missing, with 2 when they cannot be compared."
)
_SUM_NAMES = {"hidden": 0, "residual": 1}
_LONGEST_TABLE = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("a", metavar="A", help="a run's directory")
    parser.add_argument("b", metavar="B", help="the directory of the run to compare it with")
    options(parser)


def options(parser: argparse.ArgumentParser) -> None:
    """Declare what the alias `tlcore.compare_il` has, too."""
    add = parser.add_argument
    add("--rtol", type=float, help="relative tolerance (default: by dtype, as torch.testing.assert_close)")
    add("--atol", type=float, help="absolute tolerance (default: likewise)")
    add("--steps", type=_numbers, help="steps to compare, such as 0,1 (default: all)")
    add("--modules", type=_texts, default=[], help="regular expressions of module names, comma-separated")
    add("--map", action="append", default=[], metavar="REGEX=REPLACEMENT", help="rename A's modules to B's")
    add(
        "--sum",
        type=_positions,
        default=[],
        metavar="hidden,residual",
        help="add these outputs of a call where the other run has a single one",
    )
    add("--request", action="append", default=[], metavar="A=B", help="A's request id A is B's request id B")
    add("--check-dtype", action="store_true", help="a difference in dtype is a difference")
    add("--deep", action="store_true", help="read also the tensors that equal hashes settle")
    add("--format", choices=("table", "markdown", "json", "html"), default="table", help="default: table")
    add("--output", metavar="FILE", help="write the report there")
    add("--verbose", action="store_true", help="list every tensor, not only those that do not agree")


def run(args: argparse.Namespace) -> int:
    """Compare and report; returns the exit status. Raises TlcoreError when it cannot compare."""
    comparison = compare(
        args.a,
        args.b,
        rtol=args.rtol,
        atol=args.atol,
        steps=args.steps,
        modules=args.modules,
        maps=args.map,
        sums=args.sum,
        requests=dict(_request(text) for text in args.request),
        check_dtype=args.check_dtype,
        deep=args.deep,
        progress=_progress if sys.stderr.isatty() else None,
    )
    report(comparison, args.format, args.output, args.verbose)
    return 0 if comparison.equal else 1


def report(comparison: Comparison, form: str, output: str | None, verbose: bool) -> None:
    """Print the report, or write it to a file. Raises TlcoreError when the file cannot be written."""
    if form == "table" and output is None:
        _print(comparison, verbose)
        return
    if form == "json":
        text = json.dumps(comparison.to_json(), indent=1) + "\n"
    elif form == "html":
        text = page(comparison)
    else:
        text = markdown(comparison, verbose)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TlcoreError(f"{output}: cannot be written ({error.strerror})") from error


def _print(comparison: Comparison, verbose: bool) -> None:
    for line in verdict(comparison):
        print(printable(line))
    results = shown(comparison, verbose)
    limit = len(results) if verbose else _LONGEST_TABLE
    if results:
        print_table(COLUMNS, rows(results[:limit]))
    if len(results) > limit:
        print(f"... and {len(results) - limit} more; --verbose lists all")


def _progress(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done} of {total} tensors" + ("\n" if done == total else ""))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positions(text: str) -> list[int]:
    return [_SUM_NAMES[part] if part in _SUM_NAMES else int(part) for part in _texts(text)]


def _request(text: str) -> tuple[str, str]:
    mine, equals, theirs = text.partition("=")
    if not equals:
        raise ConfigError("--request", f"{text!r} is not A=B")
    return mine, theirs
