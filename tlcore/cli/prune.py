"""`tlcore prune`: old runs, crashed runs and unfinished uploads removed, after asking."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from tlcore_backends.storage.leftovers import leftovers

from ..errors import BackendError, ConfigError, ReadError
from ..locations import redact_url
from ..reader import is_run
from ..runs.prune import plan, remove
from .storage_options import add_storage_options, storage_options
from .tables import print_table, printable, size

HELP = (
    "Remove runs from an output_dir, after showing them and asking. Several criteria narrow each other. A"
    " run that may still be written is never removed. Exit status: 0 done or nothing to do, 1 not done."
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="an output_dir; a path or URL")
    parser.add_argument(
        "--older-than", metavar="AGE", type=_age, help="runs begun longer ago, such as 30d, 12h"
    )
    parser.add_argument(
        "--max-total", metavar="SIZE", type=_size, help="the oldest, until the rest takes at most 500GB or so"
    )
    parser.add_argument("--incomplete", action="store_true", help="runs that crashed: without an end mark")
    parser.add_argument(
        "--uploads", action="store_true", help="uploads in parts (S3) or files (local) unfinished for a day"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_storage_options(parser)


def run(args: argparse.Namespace) -> int:
    """Show, ask, remove. Raises ConfigError without a criterion, ReadError or BackendError for the place."""
    options = storage_options(args)
    by_run = args.older_than is not None or args.max_total is not None or args.incomplete
    if not by_run and not args.uploads:
        raise ConfigError("prune", "needs --older-than, --max-total, --incomplete or --uploads.")
    status = 0
    if by_run:
        status = _prune_runs(args, options)
    if args.uploads:
        status = max(status, _prune_uploads(args, options))
    return status


def _prune_runs(args: argparse.Namespace, options: Any) -> int:
    if is_run(args.path, options):
        advice = "give the output_dir that it lies in"
        raise ReadError(f"{redact_url(args.path)}: is a run itself, and prune removes runs; {advice}")
    chosen = plan(
        args.path,
        options,
        older_than_s=args.older_than,
        max_total=args.max_total,
        incomplete=args.incomplete,
    )
    for kept in chosen.running:
        print(printable(f"kept, it may be running: {redact_url(kept.path)}"))
    if not chosen.remove:
        print("no run to remove")
        return 0
    rows = ([each.run_id, each.state, each.created, size(each.bytes)] for each in chosen.remove)
    print_table(["run", "state", "created", "bytes"], rows)
    total = size(sum(each.bytes for each in chosen.remove))
    if not _confirmed(args, f"Remove {len(chosen.remove)} runs ({total})"):
        return 0 if args.dry_run else 1
    return _each([(redact_url(each.path), lambda each=each: remove(each, options)) for each in chosen.remove])


def _prune_uploads(args: argparse.Namespace, options: Any) -> int:
    found = leftovers(args.path, options)
    if not found:
        print("no unfinished upload to remove")
        return 0
    for each in found:
        print(printable(f"unfinished: {each.name}"))
    if not _confirmed(args, f"Remove {len(found)} unfinished uploads"):
        return 0 if args.dry_run else 1
    return _each([(each.name, each.remove) for each in found])


def _each(removals: list[tuple[str, Any]]) -> int:
    """Remove one after the other; what fails is named and the rest goes on."""
    status = 0
    for name, removal in removals:
        try:
            removal()
        except BackendError as error:
            print(printable(f"not removed: {name}: {error}"))
            status = 1
        else:
            print(printable(f"removed {name}"))
    return status


def _confirmed(args: argparse.Namespace, question: str) -> bool:
    if args.dry_run or args.yes:
        return bool(args.yes and not args.dry_run)
    if not sys.stdin.isatty():
        raise ConfigError("prune", "nobody is there to be asked.", "Give --yes, or --dry-run.")
    try:
        return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: give a number with s, m, h, d or w, as in 30d")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number as in 500GB or 2TiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _BYTES[match[2]])
