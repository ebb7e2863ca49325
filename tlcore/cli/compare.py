"""`tlcore compare`: where two runs part, as a table, Markdown or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .arguments import local_path, numbers, texts
from .dask import client_of
from .output import progress, write_text
from .storage_options import add_storage_options, storage_options
from .tables import print_table, printable

if TYPE_CHECKING:
    from ..analysis import Comparison
    from ..analysis.report.tokens import Decoder

HELP = (
    "Compare two runs tensor by tensor in order of execution. Exits with 0 when they agree, with 1 when"
    " they differ or something is missing, with 2 when they cannot be compared."
)
_SUM_NAMES = {"hidden": 0, "residual": 1}
_FORMATS = ("table", "markdown", "json", "html", "model-explorer")
_LONGEST_TABLE = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("a", metavar="A", help="a run's directory; a path or URL")
    parser.add_argument("b", metavar="B", help="the directory of the run to compare it with")
    options(parser)


def options(parser: argparse.ArgumentParser) -> None:
    """Declare what the alias `tlcore.compare_il` has, too."""
    add = parser.add_argument
    add("--rtol", type=float, help="relative tolerance (default: by dtype, as torch.testing.assert_close)")
    add("--atol", type=float, help="absolute tolerance (default: likewise)")
    add("--steps", type=numbers, help="steps to compare, such as 0,1 (default: all)")
    add("--modules", type=texts, default=[], help="regular expressions of module names, comma-separated")
    add("--map", action="append", default=[], metavar="REGEX=REPLACEMENT", help="rename A's modules to B's")
    add(
        "--sum",
        type=_positions,
        default=[],
        metavar="hidden,residual",
        help="what one run keeps in two parts, as vLLM does, and the other in one",
    )
    add(
        "--request",
        action="append",
        default=[],
        metavar="A=B",
        help="A's request A is B's request B (default: requests with the same prompt)",
    )
    add("--ignore-missing", action="store_true", help="leave out what only one run has, with a note")
    add(
        "--by-norm",
        action="store_true",
        help="hold the tolerance against norms, of each tensor and of its rows, not each value",
    )
    add(
        "--noise",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="further runs of A: a tensor differs where A is further from B than from any of them",
    )
    add("--noise-factor", type=float, default=3.0, metavar="N", help="how many times further (default: 3)")
    add(
        "--rules",
        metavar="FILE",
        help="JSON: tolerances by tensors' names, what must be there, what is left out",
    )
    add("--check-dtype", action="store_true", help="a difference in dtype is a difference")
    add("--deep", action="store_true", help="read also the tensors that equal hashes settle")
    add("--format", choices=_FORMATS, default="table", help="default: table")
    add("--output", metavar="FILE", type=local_path, help="write the report there")
    add(
        "--tokenizer",
        metavar="PATH",
        help="a directory or tokenizer.json: the HTML report then shows the texts of tokens",
    )
    add("--dask", metavar="ADDRESS", help="let a Dask cluster do the work; it must be able to open both runs")
    add_storage_options(parser)
    add("--storage-options-b", metavar="JSON", help="those of B, where they are not those of A")
    add("--verbose", action="store_true", help="list every tensor, not only those that do not agree")


def run(args: argparse.Namespace) -> int:
    """Compare and report; returns the exit status. Raises TlcoreError when it cannot compare."""
    comparison = compared(args, args.a, args.b)
    report(comparison, args)
    return 0 if comparison.equal else 1


def compared(args: argparse.Namespace, a: str, b: str) -> Comparison:
    """The comparison of two runs as the `options` say. Raises TlcoreError when it cannot compare."""
    # Imported where it is needed, as below, since torch comes with it: help answers at once.
    from ..analysis import compare

    options_b = storage_options(args, "--storage-options-b", args.storage_options_b)
    # A mistake in it is answered before the work.
    _tokenizer(args)
    with _executor(args.dask) as executor, progress("comparing", "tensors") as on_progress:
        return compare(
            a,
            b,
            rtol=args.rtol,
            atol=args.atol,
            by_norm=args.by_norm,
            steps=args.steps,
            modules=args.modules,
            maps=args.map,
            sums=args.sum,
            requests=dict(_request(text) for text in args.request),
            ignore_missing=args.ignore_missing,
            check_dtype=args.check_dtype,
            deep=args.deep,
            noise=args.noise,
            noise_factor=args.noise_factor,
            rules=args.rules,
            storage_options=storage_options(args),
            storage_options_b=options_b,
            executor=executor,
            progress=on_progress,
        )


@contextmanager
def _executor(dask: str | None) -> Iterator[Executor | None]:
    """The cluster at an address as an executor. Raises BackendError when it cannot be reached."""
    with client_of(dask) as client:
        # Pure functions would be looked up by a hash of their arguments, which costs more than it saves.
        yield None if client is None else client.get_executor(pure=False)


def report(comparison: Comparison, args: argparse.Namespace) -> None:
    """Print the report, or write it to a file. Raises TlcoreError when the file cannot be written."""
    from ..analysis.report import page
    from ..analysis.report.text import markdown

    if args.format == "table" and args.output is None:
        _print(comparison, args.verbose)
    elif args.format == "json":
        write_text(json.dumps(comparison.to_json(), indent=1) + "\n", args.output)
    elif args.format == "html":
        write_text(page(comparison, _tokenizer(args)), args.output)
    elif args.format == "model-explorer":
        _write_overlay(comparison, args.output)
    else:
        write_text(markdown(comparison, args.verbose), args.output)


def _write_overlay(comparison: Comparison, output: str | None) -> None:
    """The node data that Model Explorer takes, and where it goes to a file, the graph for it beside that."""
    from ..analysis.report.model_explorer import graph, node_data

    write_text(node_data(comparison), output)
    if output is not None:
        write_text(graph(comparison), str(Path(output).with_suffix(".graph.json")))


def _tokenizer(args: argparse.Namespace) -> Decoder | None:
    """Raises TlcoreError where what was given is no tokenizer, or nothing would show it."""
    if args.tokenizer is None:
        return None
    if args.format != "html":
        raise ConfigError("--tokenizer", "only --format html shows the texts of tokens")
    from ..analysis.report.tokens import load_tokenizer

    return load_tokenizer(args.tokenizer)


def _print(comparison: Comparison, verbose: bool) -> None:
    from ..analysis.report.text import COLUMNS, rows, shown, verdict

    for line in verdict(comparison):
        print(printable(line))
    results = shown(comparison, verbose)
    limit = len(results) if verbose else _LONGEST_TABLE
    if results:
        print_table(COLUMNS, rows(results[:limit]))
    if len(results) > limit:
        print(f"... and {len(results) - limit} more; --verbose lists all")


def _positions(text: str) -> list[int]:
    try:
        return [_SUM_NAMES[part] if part in _SUM_NAMES else int(part) for part in texts(text)]
    except ValueError:
        advice = "give the names hidden,residual or output positions such as 0,1"
        raise argparse.ArgumentTypeError(f"{text!r} is no list of parts: {advice}") from None


def _request(text: str) -> tuple[str, str]:
    mine, equals, theirs = text.partition("=")
    if not equals:
        raise ConfigError("--request", f"{text!r} is not A=B")
    return mine, theirs
