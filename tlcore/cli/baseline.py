"""`tlcore baseline`: keep a small run beside the code, and fail a change that parts from it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, TlcoreError
from . import compare
from .arguments import local_path
from .output import progress, write_text
from .storage_options import add_storage_options, storage_options
from .tables import printable

if TYPE_CHECKING:
    from ..analysis import Comparison

HELP = (
    "Keep a run as a baseline in a repository (save), and hold another run against it (check). check exits"
    " with 0 when they agree, with 1 when they differ or something is missing, with 2 when it cannot tell."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(
        metavar="save|check", dest="action", required=True, parser_class=argparse.ArgumentParser
    )
    save = actions.add_parser("save", help="keep a run's tensors, or its statistics and hashes")
    save.add_argument("run_path", metavar="RUN", help="a complete run; a path or URL")
    save.add_argument(
        "baseline", metavar="BASELINE", type=local_path, help="a directory; with --stats a JSON file"
    )
    save.add_argument("--stats", action="store_true", help="keep statistics and hashes in one JSON file")
    save.add_argument("--replace", action="store_true", help="in the place of a baseline that is there")
    add_storage_options(save)
    check = actions.add_parser("check", help="hold a run against a baseline, as `tlcore compare` does")
    check.add_argument("baseline", metavar="BASELINE", type=local_path, help="what save made; it is A")
    check.add_argument("run_path", metavar="RUN", help="the run to hold against it, B; a path or URL")
    check.add_argument("--junit", metavar="FILE", type=local_path, help="write JUnit XML there")
    check.add_argument(
        "--summary",
        metavar="FILE",
        type=local_path,
        help="append a Markdown summary, as to $GITHUB_STEP_SUMMARY",
    )
    compare.options(check)


def run(args: argparse.Namespace) -> int:
    """Save or check; returns the exit status. Raises TlcoreError when it cannot."""
    if args.action == "check":
        return _check(args)
    target = Path(args.baseline)
    if target.exists() and not args.replace:
        raise TlcoreError(f"{target} is there already; --replace puts the new baseline in its place")
    if target.exists() and target.is_dir() == args.stats:
        kinds = ("a directory", "a file") if args.stats else ("a file", "a directory")
        raise TlcoreError(f"{target} is {kinds[0]}, and this baseline is {kinds[1]}")
    (_save_statistics if args.stats else _save_tensors)(args, target)
    print(printable(f"baseline: {target}"))
    return 0


def _save_statistics(args: argparse.Namespace, target: Path) -> None:
    from ..analysis.baseline import baseline_text
    from ..reader import open_run

    with progress("reading", "tensors") as on_progress:
        text = baseline_text(open_run(args.run_path, storage_options(args)), on_progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, str(target))


def _save_tensors(args: argparse.Namespace, target: Path) -> None:
    """A directory with one run in segments: few files, whatever it was written as."""
    from ..config.configuration import load_config
    from ..reader import open_run
    from ..runs.convert import convert

    run = open_run(args.run_path, storage_options(args))
    before = _runs_in(target)
    if run.id in {each.name for each in before}:
        raise TlcoreError(f"{target} holds this very run already")
    convert(run, load_config(output_dir=str(target), backend="safetensors"))
    for each in before:
        shutil.rmtree(each)


def _runs_in(directory: Path) -> list[Path]:
    return sorted(each.parent for each in directory.glob("*/run.json"))


def _check(args: argparse.Namespace) -> int:
    target = Path(args.baseline)
    if not target.exists():
        raise TlcoreError(f"{target}: there is no such baseline; `tlcore baseline save` makes one")
    if target.is_file():
        comparison = _against_statistics(args, target)
    else:
        found = _runs_in(target)
        if not found and (target / "run.json").exists():
            raise TlcoreError(f"{target} is a run, no baseline; write `tlcore baseline check BASELINE RUN`")
        if len(found) != 1:
            raise TlcoreError(f"{target}: a baseline has one run in it, here are {len(found)}")
        comparison = compare.compared(args, str(found[0]), args.run_path)
    compare.report(comparison, args)
    if args.junit is not None or args.summary is not None:
        from ..analysis.report.ci import junit, summary

        if args.junit is not None:
            write_text(junit(comparison, f"baseline {target.name}"), args.junit)
        if args.summary is not None:
            write_text(summary(comparison), args.summary, append=True)
    return 0 if comparison.equal else 1


def _against_statistics(args: argparse.Namespace, file: Path) -> Comparison:
    from ..analysis.baseline import check_statistics
    from ..reader import open_run

    tensors_only = ("noise", "rules", "map", "sum", "request", "by_norm", "steps", "modules", "dask", "deep")
    for name in (*tensors_only, "check_dtype", "ignore_missing"):
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, f"{file} has statistics alone; this needs a baseline of tensors")
    if args.format in ("html", "model-explorer"):
        raise ConfigError("--format", f"{file} has statistics alone, which make no pictures")
    with progress("reading", "tensors") as on_progress:
        run = open_run(args.run_path, storage_options(args))
        return check_statistics(file, run, args.rtol, args.atol, on_progress)
